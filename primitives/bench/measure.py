"""Measures collectives: blocks of calls, every contestant in turn, until enough are clean."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from primitives.bench.case import (
    ALWAYS_IN_PLACE,
    DTYPES,
    NEVER_IN_PLACE,
    OPS,
    REDUCE_OPS,
    Case,
    sizes,
    storage_dtype,
)
from primitives.bench.figures import LIMITS, MAX_FOREIGN, Block, Placement, Row, timing_of
from primitives.bench.jobs import LAUNCHERS, MPI_DIR, Jobs, mpi_command
from primitives.bench.payload import MAX_RANKS
from primitives.bench.rank import MPIS

MIN_BLOCKS = 3
OURS = ("gloo", "symmetric")
"""Competitors in the same processes; symmetric: this backend on symmetric memory."""
ON_CUDA = ("nccl", "symmetric")
"""Competitors on a GPU; nccl wants one for each rank."""


@dataclass(frozen=True)
class Plan:
    """What to measure, in nccl-tests' words. Sizes in bytes, of the whole array."""

    op: str
    min_nbytes: int = 8
    max_nbytes: int = 128 << 20
    factor: int | None = 2
    step_nbytes: int | None = None
    dtype: str = "float"
    reduce_op: str = "sum"
    root: int = 0
    num_blocks: int = 20
    """Timed blocks of each contestant at each size."""
    warmup: int = 5
    check: bool = True
    num_ranks: int = 4
    launcher: str = "mp"
    level: str = "c10d"
    against: tuple[str, ...] = ("gloo",)
    device: str = "cpu"
    """Whose tensors; on "cuda" rank r uses GPU r, or shares one when there are fewer."""
    block_s: float = 0.05
    """About how long a block lasts: as many calls as fit, at least one."""
    max_s: float = 20.0
    """Longest measurement of one size in one placement, once every contestant has 3 blocks."""

    def __post_init__(self) -> None:
        def expect(what: str, got: object, choices: tuple[str, ...]) -> None:
            if got not in choices:
                raise ValueError(f"{what}: expected one of {', '.join(choices)}, got {got}")

        expect("operation", self.op, OPS)
        expect("-d", self.dtype, tuple(DTYPES))
        expect("-o", self.reduce_op, REDUCE_OPS)
        expect("--launcher", self.launcher, LAUNCHERS)
        expect("--level", self.level, ("c10d", "communicator"))
        expect("--device", self.device, ("cpu", "cuda"))
        on_cuda = self.device == "cuda"
        if on_cuda and (self.level, self.launcher) != ("c10d", "mp"):
            raise ValueError("--device cuda: expected --level c10d and --launcher mp")
        for name in self.against:
            expect("--against", name, ON_CUDA if on_cuda else (*OURS, *MPIS))
        if not 1 <= self.num_ranks <= MAX_RANKS:
            raise ValueError(f"--ranks: expected 1 to {MAX_RANKS}, got {self.num_ranks}")
        if not 0 <= self.root < self.num_ranks:
            raise ValueError(f"-r: expected a rank in [0, {self.num_ranks}), got {self.root}")
        if self.num_blocks < 1 or self.warmup < 0:
            raise ValueError(f"expected -n >= 1 and -w >= 0, got -n {self.num_blocks} "
                             f"-w {self.warmup}")  # fmt: skip
        if self.reduce_op == "avg" and self.dtype.startswith(("int", "uint")):
            raise ValueError(f"-o avg is not defined for -d {self.dtype}")

    def sizes(self) -> list[int]:
        """The sizes to measure; a barrier has none."""
        if self.op == "barrier":
            return [0]
        itemsize = storage_dtype(DTYPES[self.dtype]).itemsize
        return sizes(
            self.min_nbytes, self.max_nbytes, factor=self.factor, step=self.step_nbytes,
            itemsize=itemsize, world_size=self.num_ranks,
        )  # fmt: skip

    def case(self, nbytes: int, in_place: bool) -> Case:
        """One size, in one placement."""
        return Case(self.op, nbytes, DTYPES[self.dtype], self.reduce_op, self.root,
                    self.num_ranks, in_place)  # fmt: skip

    def jobs(self) -> tuple[list[tuple[list[str], str]], list[str]]:
        """Contestants and launcher of each job, and which MPIs are absent."""
        if self.device == "cuda":
            names = ["primitives", *self.against, "copy"]
            return [([f"{name}@cuda" for name in names], self.launcher)], []
        mine = ["primitives", "raw", "noop"] if self.level == "c10d" else ["raw"]
        mine += [name for name in self.against if name in OURS]
        jobs = [([*mine, *LIMITS[:2]], self.launcher)]
        absent = []
        for name in self.against:
            if name in MPIS:
                if mpi_command(name, self.num_ranks) is None:
                    absent.append(name)
                else:
                    jobs.append(([name], name))
        return jobs, absent


def measure(plans: Sequence[Plan]) -> Iterator[tuple[Plan, Row]]:
    """Starts the ranks once and measures plan by plan, size by size.

    Args:
        plans: alike but for the operation and its sizes.

    Raises:
        ValueError: bad input, or a launcher that is not installed.
        BenchFailed: a rank ended or hung.
    """
    todo = [(plan, nbytes) for plan in plans for nbytes in plan.sizes()]
    wanted, _ = plans[0].jobs()
    if any(plan.jobs()[0] != wanted or plan.num_ranks != plans[0].num_ranks for plan in plans):
        raise ValueError("expected plans for the same ranks, launcher, level and competitors")
    with Jobs(wanted, plans[0].num_ranks) as jobs:
        for plan, nbytes in todo:
            out_of_place = plan.op not in ALWAYS_IN_PLACE
            in_place = plan.op not in NEVER_IN_PLACE
            row = Row(
                nbytes,
                plan.case(nbytes, False).count,
                _measure_case(plan, plan.case(nbytes, False), jobs) if out_of_place else None,
                _measure_case(plan, plan.case(nbytes, True), jobs) if in_place else None,
            )
            yield plan, row


def _measure_case(plan: Plan, case: Case, jobs: Jobs) -> Placement:
    found = Placement()
    turns = []
    wrong: dict[str, int] = {}
    num_calls: dict[str, int] = {}
    for link in jobs.links:
        question = {
            "do": "bind", "case": asdict(case), "check": plan.check, "warmup": plan.warmup,
        }  # fmt: skip
        answers = link.ask(question)
        for name, told in answers[0].items():
            if "error" in told:
                found.errors[name] = told["error"]
                continue
            turns.append((name, link))
            wrong[name] = sum(answer[name]["wrong"] for answer in answers)
            call_s = max(answer[name]["seconds"] for answer in answers)
            num_calls[name] = max(1, min(3000, int(plan.block_s / max(call_s, 1e-9))))
    blocks: dict[str, list[Block]] = {name: [] for name, _ in turns}
    end = time.monotonic() + plan.max_s
    for turn in range(10 * plan.num_blocks):
        num_clean = [sum(b.foreign <= MAX_FOREIGN for b in of) for of in blocks.values()]
        late = turn >= MIN_BLOCKS and time.monotonic() > end
        if late or not turns or min(num_clean) >= plan.num_blocks:
            break
        first = turn % len(turns)
        for name, link in turns[first:] + turns[:first]:
            busy, clock, own = _busy_s(), time.monotonic(), time.process_time()
            told = link.ask({"do": "measure", "contestant": name, "num_calls": num_calls[name]})
            wall = time.monotonic() - clock
            own = time.process_time() - own
            others = _busy_s() - busy - own - sum(answer["cpu"] for answer in told)
            took = max(a["end"] for a in told) - min(a["start"] for a in told)
            foreign = max(0.0, others / (wall * (os.cpu_count() or 1)))
            singles_us = np.concatenate([answer["singles_us"] for answer in told])
            blocks[name].append(Block(foreign, took / num_calls[name], singles_us))
    for name, measured in blocks.items():
        checked = plan.check and name not in LIMITS
        found.timings[name] = timing_of(measured, plan.num_blocks, wrong[name] if checked else None)
    return found


def _busy_s() -> float:
    """CPU seconds that everything on this machine, or in this container, has used so far."""
    v1 = Path("/sys/fs/cgroup/cpuacct/cpuacct.usage")
    if v1.exists():
        return int(v1.read_text()) / 1e9
    v2 = Path("/sys/fs/cgroup/cpu.stat")
    if v2.exists():
        return int(v2.read_text().split()[1]) / 1e6
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def absent_message(names: list[str]) -> str:
    """How to get the MPIs that are not there."""
    return f"not measured: {', '.join(names)} (not in {MPI_DIR}); to get them: make bench-mpi"


__all__ = ["Plan", "absent_message", "measure"]
