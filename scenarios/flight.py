"""Merges the flight recorder's dumps of all ranks into one timeline and says what is wrong."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
CALL_FIELDS = ("op", "reduce_op", "dtype", "numel", "root")
MAY_DIFFER = {"all_to_all": ("numel",), "all_gather": ("numel",), "reduce_scatter": ("numel",)}
"""Fields in which the ranks of one call may differ: parts of uneven size."""


@dataclass
class Step:
    """One collective of one group, as each rank made it; or one message of one rank."""

    group: str
    seq: int
    by_rank: dict[int, Record] = field(default_factory=dict)

    @property
    def start_ns(self) -> int:
        return min(int(record["start_ns"]) for record in self.by_rank.values())

    def as_json(self) -> dict[str, Any]:
        ranks = {str(rank): record for rank, record in sorted(self.by_rank.items())}
        return {"group": self.group, "seq": self.seq, "ranks": ranks}


@dataclass
class Flight:
    """All dumps of one job."""

    ranks: list[int]
    """Global ranks that left a dump."""
    steps: list[Step]
    """By start time."""
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        timeline = [step.as_json() for step in self.steps]
        return {"ranks": self.ranks, "problems": self.problems, "timeline": timeline}


def read_dumps(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The dumps in files and folders; of several of one process, the newest.

    Raises:
        ValueError: there is none, or a file is not a dump.
    """
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("**/flight_rank_*.json")) if path.is_dir() else [path]
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for file in files:
        try:
            dump = json.loads(file.read_text())
            if dump["version"] != 1:
                raise ValueError(f"{file}: expected a dump of version 1, got {dump['version']}")
            key = (dump["boot"], dump["pid"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a dump of the flight recorder: {error!r}") from None
        if key not in newest or newest[key]["time_ns"] < dump["time_ns"]:
            newest[key] = dump
    if not newest:
        raise ValueError(f"no dumps (flight_rank_*.json) in {', '.join(map(str, paths))}")
    return sorted(newest.values(), key=lambda dump: (dump["rank"], dump["pid"]))


def merge(dumps: Sequence[dict[str, Any]]) -> Flight:
    """One timeline, aligned by (group, sequence number)."""
    steps: dict[tuple[str, int], Step] = {}
    messages: list[Step] = []
    for dump in dumps:
        for record in dump["records"]:
            name, seq = record["group"], record["seq"]
            if seq == 0:
                messages.append(Step(name, 0, {record["rank"]: record}))
            else:
                steps.setdefault((name, seq), Step(name, seq)).by_rank[record["rank"]] = record
    collectives = sorted(steps.values(), key=lambda step: (step.group, step.seq))
    problems = [
        *(failure for failure in dict.fromkeys(_failures(dumps))),
        *_absent_ranks(dumps),
        *_different_calls(collectives),
        *_ranks_behind(dumps),
        *_pending_messages(messages),
    ]
    timeline = sorted([*collectives, *messages], key=lambda step: step.start_ns)
    return Flight([dump["rank"] for dump in dumps], timeline, problems)


def describe(record: Record) -> str:
    """Like ``all_reduce(sum, float32, 8)``."""
    if record["op"] == "barrier":
        return "barrier"
    parts = [record["reduce_op"], record["dtype"], str(record["numel"])]
    if record["root"] >= 0:
        parts.append(f"root {record['root']}")
    if record["op"] in ("send", "recv"):
        other = "any rank" if record["peer"] < 0 else f"rank {record['peer']}"
        parts += [("to " if record["op"] == "send" else "from ") + other, f"tag {record['tag']}"]
    return f"{record['op']}({', '.join(part for part in parts if part)})"


def _at(site: str) -> str:
    return f" at {site}" if site else ""


def _failures(dumps: Sequence[dict[str, Any]]) -> Iterable[str]:
    for dump in dumps:
        for group in dump["groups"]:
            if group["failure"]:
                yield f"group '{group['name']}' failed: {group['failure']}"
        if not any(group["failure"] for group in dump["groups"]) and dump["reason"]:
            yield f"rank {dump['rank']} was dumped because of: {dump['reason']}"


def _absent_ranks(dumps: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Ranks without a dump of their own, as the others saw them last."""
    told = {dump["pid"] for dump in dumps}
    for dump in dumps:
        for group in dump["groups"]:
            for rank in group["ranks"]:
                if rank["pid"] in told or rank["pid"] == 0:
                    continue
                told.add(rank["pid"])
                yield (
                    f"rank {rank['global_rank']} (pid {rank['pid']}) left no dump; seen by rank "
                    f"{dump['rank']} as {rank['state']}, {_stand(group['name'], rank)}"
                )


def _stand(group: str, rank: dict[str, Any]) -> str:
    if rank["seq"] == 0:
        stand = f"before the first collective of group '{group}'"
    else:
        where = "inside" if rank["inside"] else "after"
        stand = f"{where} collective {rank['seq']} of group '{group}', {rank['op']}"
    waiting = f", waiting as {rank['waiting']}" if rank["waiting"] else ""
    return stand + _at(rank["site"]) + waiting


def _different_calls(collectives: Sequence[Step]) -> Iterable[str]:
    for step in collectives:
        may_differ = {key for r in step.by_rank.values() for key in MAY_DIFFER.get(r["op"], ())}
        calls: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for rank, record in sorted(step.by_rank.items()):
            key = tuple(record[name] for name in CALL_FIELDS if name not in may_differ)
            calls[key].append(rank)
        if len(calls) < 2:
            continue
        sides = []
        for ranks in calls.values():
            record = step.by_rank[ranks[0]]
            sides.append(
                f"rank {', '.join(map(str, ranks))}: {describe(record)}{_at(record['site'])}"
            )
        yield f"collective {step.seq} of group '{step.group}' differs: {'; '.join(sides)}"


def _ranks_behind(dumps: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Per group, ranks that have not come as far as the others, by the latest dump of it."""
    latest: dict[str, dict[str, Any]] = {}
    for dump in sorted(dumps, key=lambda dump: dump["time_ns"]):
        latest |= {group["name"]: group for group in dump["groups"]}
    for name, group in sorted(latest.items()):
        # A rank that is after collective 4 is as far as one inside it: it came.
        furthest = max(rank["seq"] for rank in group["ranks"])
        for rank in group["ranks"]:
            if rank["seq"] < furthest:
                yield (
                    f"rank {rank['global_rank']} is behind in group '{name}', where others are in "
                    f"collective {furthest}: {rank['state']}, {_stand(name, rank)}"
                )


def _pending_messages(messages: Sequence[Step]) -> Iterable[str]:
    pending: Counter[tuple[str, int, str]] = Counter()
    for step in messages:
        for rank, record in step.by_rank.items():
            if record["state"] != "done":
                pending[step.group, rank, describe(record) + _at(record["site"])] += 1
    for (group, rank, what), number in pending.items():
        times = f", {number} times" if number > 1 else ""
        yield f"rank {rank} of group '{group}' never finished {what}{times}"


def table(flight: Flight, num_rows: int) -> Any:
    """The last rows of the timeline for the terminal (rich)."""
    from rich.table import Table

    rows = Table("ms", "group", "seq", "ranks", "call", "state", "ms inside", "call site")
    begin_ns = flight.steps[0].start_ns if flight.steps else 0
    for step in flight.steps[-num_rows:]:
        alike: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for rank, record in sorted(step.by_rank.items()):
            alike[describe(record), record["state"], record["site"]].append(rank)
        for number, ((call, state, site), ranks) in enumerate(alike.items()):
            spans = [step.by_rank[r]["end_ns"] - step.by_rank[r]["start_ns"] for r in ranks]
            span = f"{max(spans) / 1e6:.3f}" if min(spans) >= 0 else "-"
            first = number == 0
            rows.add_row(
                f"{(step.start_ns - begin_ns) / 1e6:.3f}" if first else "",
                step.group if first else "",
                str(step.seq or "") if first else "",
                ",".join(map(str, ranks)),
                call,
                state,
                span,
                site,
            )
    return rows
