"""What the commands of ``testbed`` do, without how it is shown."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scenarios.compare import Comparison, compare_strict
from scenarios.failures import RunFailed
from scenarios.golden import (
    Golden,
    first_steps,
    read_golden,
    read_golden_file,
    without_measured,
    write_atomically,
    write_golden,
)
from scenarios.inference.throughput import describe_throughput, record_throughput
from scenarios.launch import check_port
from scenarios.machine import ANY_MACHINE
from scenarios.provenance import provenance
from scenarios.runner import LaunchOptions, Played, check_device, check_golden, make_out_dir, play
from scenarios.schema import Arithmetic, Scenario, list_scenarios, load_scenario
from scenarios.verdict import Check, Verdict, difference_lines

__all__ = [
    "LaunchOptions",
    "Recording",
    "all_cases",
    "golden_of",
    "judge_case",
    "list_rows",
    "record_case",
]


def judge_case(
    case: str,
    *,
    scale: str,
    arithmetic: Arithmetic,
    layout: str | None,
    resume_layout: str | None,
    data: Path | None,
    num_steps: int | None = None,
    with_golden: bool = True,
    out: Path | None,
    options: LaunchOptions,
) -> Verdict:
    """Runs a case, holds it against its golden and writes ``verdict.json``.

    Args:
        case, scale, arithmetic, layout, data: as for ``load_scenario``.
        resume_layout: of run 2; None: that of run 1.
        num_steps: train and judge only the first steps, without resume unless ``resume_layout`` is
            given; None: all.
        with_golden: False judges the invariants only; own data has no golden anyway.
        out: new or empty folder; None: one in ``runs/``.
        options: how the ranks are started.

    Raises:
        ValueError: bad input, or no golden was recorded for this scale.
        RunFailed: a run crashed, hung or was interrupted.
    """
    choices: dict[str, Any] = {"scale": scale, "data": data, "arithmetic": arithmetic}
    scenario = load_scenario(case, layout=layout, **choices)
    resumed = None
    if resume_layout is not None:
        resumed = load_scenario(case, layout=resume_layout, **choices)
        if scenario.test_type != "ckpt-resume":
            raise ValueError(f"--resume-layout: {case} is a {scenario.test_type} test: no resume")
    golden, note = None, "without a golden: only the invariants were judged"
    if scenario.data.prefix:
        note = "own data has no golden: only the invariants were judged"
    elif with_golden:
        golden, note = golden_of(scenario, case), ""
    if num_steps is not None and scenario.inference:
        raise ValueError(f"--steps: {case} trains nothing")
    if num_steps is not None:
        train_iters = scenario.training.train_iters
        if num_steps > train_iters:
            raise ValueError(
                f"--steps: got {num_steps}, expected at most train_iters = {train_iters}"
            )
        note = f"the first {num_steps} of {train_iters} steps" + (f"; {note}" if note else "")
        scenario = scenario.first_steps(num_steps, resume=resumed is not None)
        resumed = resumed.first_steps(num_steps, resume=True) if resumed else None
        golden = replace(golden, metrics=first_steps(golden.metrics, num_steps)) if golden else None
    check_port(options.master_port)
    check_device(options.device, scenario)
    out_dir = make_out_dir(out, scenario.name)
    played = _play(scenario, out_dir, options, resumed)
    if played.rounds_tokens_s:
        note = "; ".join(
            filter(None, [note, describe_throughput(scenario, played.rounds_tokens_s)])
        )
    checks = [*played.checks, *([check_golden(scenario, golden, played.metrics)] if golden else [])]
    return _verdict(scenario, out_dir, played, checks, note)


def all_cases(scale: str) -> list[str]:
    """Names of the shipped cases that have this scale."""
    return [info.name for info in list_scenarios() if scale in info.layouts]


@dataclass(frozen=True)
class Recording:
    """What ``record`` did, or why it did not."""

    verdict: Verdict
    path: Path
    written: bool
    changes: Comparison | None
    """Against the old golden, None without one."""

    @property
    def exit_code(self) -> int:
        """0 if the file holds this run's values, 1 if they were refused."""
        return self.verdict.exit_code

    def lines(self) -> list[str]:
        """The verdict on the invariants, what changed, and what was written."""
        lines = self.verdict.lines()
        if not self.verdict.passed:
            return [*lines, f"refused: not recorded in {self.path}"]
        if self.changes is None:
            return [*lines, f"recorded, for the first time: {self.path}"]
        if not self.written:
            return [*lines, f"unchanged, not written: {self.path}"]
        if self.changes.passed:
            return [*lines, f"the same values, recorded from a committed tree now: {self.path}"]
        changed = [f"against the old golden {self.changes.summary}:"]
        return [*lines, *changed, *difference_lines(self.changes, "  "), f"recorded: {self.path}"]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        changes = self.changes.differences if self.changes else ()
        return {
            "verdict": self.verdict.as_json(),
            "golden": str(self.path),
            "written": self.written,
            "changes": [difference.as_json() for difference in changes],
            "exit_code": self.exit_code,
        }


def record_case(
    case: str,
    *,
    scale: str,
    arithmetic: Arithmetic,
    layout: str | None,
    out: Path | None,
    command: str,
    options: LaunchOptions,
) -> Recording:
    """Runs a case and records run 1 as its golden, unless an invariant fails or nothing changed.

    Measured times and memory, which only native goldens hold, always change and do not count.

    Raises:
        ValueError: bad input, own data, or a golden file that cannot be read.
        RunFailed: a run crashed, hung or was interrupted.
    """
    scenario = load_scenario(case, scale=scale, layout=layout, arithmetic=arithmetic)
    if scenario.data.prefix:
        raise ValueError(f"{case}: reads own data from {scenario.data.prefix}; goldens need none")
    path = scenario.golden_path
    old = read_golden_file(path).get(scale) if path.exists() else None
    check_port(options.master_port)
    check_device(options.device, scenario)
    out_dir = make_out_dir(out, scenario.name)
    played = _play(scenario, out_dir, options)
    verdict = _verdict(scenario, out_dir, played, list(played.checks), "")
    changes = None
    if old:
        changes = compare_strict(without_measured(old.metrics), without_measured(played.metrics))
    origin = provenance(command, scale, str(scenario.layout), arithmetic)
    # The same values are worth writing where the old ones cannot be traced to a commit.
    traced = bool(old and old.provenance.get("dirty")) and not origin["dirty"]
    write = verdict.passed and (traced or not (changes and changes.passed))
    if write:
        write_golden(path, scale, Golden(played.metrics, origin))
        if played.rounds_tokens_s:
            record_throughput(scenario, played.rounds_tokens_s, command)
    return Recording(verdict, path, write, changes)


def list_rows() -> list[dict[str, Any]]:
    """One row for each scenario and scale."""
    rows = []
    for info in list_scenarios():
        for scale, layout in sorted(info.layouts.items()):
            path = load_scenario(str(info.path), scale=scale).golden_path
            row = {
                "alias": info.alias,
                "family": info.family,
                "name": info.name,
                "scale": scale,
                "layout": str(layout),
                "num_ranks": layout.world_size,
                "test_type": info.test_type,
                "golden": _has_scale(path, scale),
            }
            rows.append(row)
    return rows


def golden_of(scenario: Scenario, case: str) -> Golden:
    """The golden of a case at its scale.

    Raises:
        ValueError: none was recorded; the message says how to.
    """
    path = scenario.golden_path
    arithmetic = "" if scenario.arithmetic == "canonical" else " --arithmetic native"
    how = f"record it with: testbed record {case} --scale {scenario.scale}{arithmetic}"
    if scenario.arithmetic == "native" and not _has_scale(path, scenario.scale):
        any_machine = path.with_name(f"golden_values_{ANY_MACHINE}.json")
        path = any_machine if any_machine.exists() else path
    if not path.exists():
        raise ValueError(f"no golden recorded: {path} does not exist; {how}")
    if not _has_scale(path, scenario.scale):
        raise ValueError(f"no golden recorded for scale {scenario.scale} in {path}; {how}")
    golden = read_golden(path, scenario.scale)
    if golden.arithmetic != scenario.arithmetic:
        raise ValueError(
            f"{path}: holds {golden.arithmetic} values; a run in {scenario.arithmetic} arithmetic "
            "cannot be compared with them"
        )
    return golden


def _has_scale(path: Path, scale: str) -> bool:
    return path.exists() and scale in read_golden_file(path)


def _play(
    scenario: Scenario, out_dir: Path, options: LaunchOptions, resumed: Scenario | None = None
) -> Played:
    """Plays; a failed run leaves its failure as the verdict."""
    try:
        return play(scenario, out_dir, options, resumed)
    except RunFailed as error:
        _write_verdict(out_dir, {"verdict": "run failed", "exit_code": 3, "error": error.as_json()})
        raise


def _write_verdict(out_dir: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1, allow_nan=False)
    write_atomically(out_dir / "verdict.json", text + "\n")


def _verdict(
    scenario: Scenario, out_dir: Path, played: Played, checks: list[Check], note: str
) -> Verdict:
    verdict = Verdict(
        case=f"{scenario.family}/{scenario.name}",
        scale=scenario.scale,
        layout=str(scenario.layout),
        num_ranks=scenario.layout.world_size,
        out_dir=out_dir,
        runs=played.runs,
        checks=tuple(checks),
        note=note,
    )
    _write_verdict(out_dir, verdict.as_json())
    return verdict
