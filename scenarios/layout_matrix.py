"""One case in many layouts, each held against the one golden: ``testbed run CASE --layouts``.

``LAYOUT>OTHER`` saves in the one half-way and resumes in the other.
"""

import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scenarios.case_files import find_case
from scenarios.commands import golden_of
from scenarios.compare import Comparison
from scenarios.failures import RunFailed
from scenarios.fork_server import ForkServer
from scenarios.golden import Metrics, first_steps, write_atomically
from scenarios.launch import check_port
from scenarios.layout import Layout
from scenarios.runner import LaunchOptions, check_device, make_out_dir, play
from scenarios.schema import Arithmetic, Scenario, load_scenario
from scenarios.tolerance import compare_golden

MAX_RANKS = 8
"""Of the layouts that ``all`` stands for."""
NUM_PAIRS = 12
"""Of layouts, that ``pairs`` stands for."""
DEGREES = {"tp": (1, 2, 4, 8), "pp": (1, 2, 4), "dp": (1, 2, 4, 8), "ep": (1, 2, 4), "etp": (1, 2)}

Outcome = Literal["same", "differs", "refused", "failed"]
EXIT_CODES: dict[Outcome, int] = {"same": 0, "differs": 1, "refused": 2, "failed": 3}


@dataclass(frozen=True)
class Row:
    """What came of one layout."""

    layout: str
    outcome: Outcome
    wall_s: float = 0.0
    detail: str = ""
    """The first difference, or why there is nothing to compare."""
    comparison: Comparison | None = None

    def line(self) -> str:
        """The row as text."""
        return f"{self.outcome:8} {self.layout:36} {self.wall_s:6.1f} s  {self.detail}".rstrip()

    def as_json(self) -> dict[str, Any]:
        """Plain values; all differences."""
        differences = self.comparison.differences if self.comparison else ()
        return {
            "layout": self.layout,
            "outcome": self.outcome,
            "wall_s": self.wall_s,
            "detail": self.detail,
            "differences": [difference.as_json() for difference in differences],
        }


@dataclass(frozen=True)
class Matrix:
    """What came of all layouts of a case."""

    case: str
    scale: str
    num_steps: int
    train_iters: int
    rows: tuple[Row, ...]
    out_dir: Path

    @property
    def exit_code(self) -> int:
        """The worst of the rows: 0 same, 1 differs, 2 refused, 3 failed."""
        return max(EXIT_CODES[row.outcome] for row in self.rows)

    def summary(self) -> str:
        """One line: how many layouts, how many values, how many steps."""
        counts = {name: [row.outcome for row in self.rows].count(name) for name in EXIT_CODES}
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        values = max((row.comparison.num_values for row in self.rows if row.comparison), default=0)
        steps = f"the first {self.num_steps} of {self.train_iters} steps"
        if self.num_steps == self.train_iters:
            steps = f"all {self.num_steps} steps"
        word = "FAIL" if self.exit_code else "PASS"
        return (
            f"{word}  {len(self.rows)} layouts: {said}; {values} values each, {steps}  "
            f"({self.out_dir})"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "case": self.case,
            "scale": self.scale,
            "num_steps": self.num_steps,
            "train_iters": self.train_iters,
            "verdict": "fail" if self.exit_code else "pass",
            "exit_code": self.exit_code,
            "layouts": [row.as_json() for row in self.rows],
            "out_dir": str(self.out_dir),
        }


def judge_layouts(
    case: str,
    layouts: str,
    *,
    scale: str,
    arithmetic: Arithmetic,
    num_steps: int | None,
    out: Path | None,
    options: LaunchOptions,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Matrix:
    """Trains a case in many layouts and compares each with the golden.

    Args:
        case: as for ``load_scenario``.
        layouts: ``all``, ``pairs``, or layouts and ``LAYOUT>OTHER`` separated by semicolons.
        scale: ``ci`` or ``full``.
        arithmetic: ``canonical`` or ``native``.
        num_steps: train and judge only so many steps; None: all.
        out: new or empty folder; each layout gets a folder in it.
        options: how the ranks are started; a step's progress is not shown.
        on_row: called after each layout.

    Raises:
        ValueError: no golden, or a number of steps that the golden does not have.
        RunFailed: interrupted; other failures are a row.
    """
    base = load_scenario(case, scale=scale, arithmetic=arithmetic)
    if base.data.prefix:
        raise ValueError(f"{case}: reads own data from {base.data.prefix}; it has no golden")
    golden = golden_of(base, case)
    train_iters = base.training.train_iters
    num_steps = num_steps or train_iters
    if num_steps > train_iters:
        raise ValueError(f"--steps: got {num_steps}, expected at most train_iters = {train_iters}")
    if base.inference and num_steps != train_iters:
        raise ValueError(f"--steps: {case} trains nothing")
    expected = golden.metrics if base.inference else first_steps(golden.metrics, num_steps)
    names = _names(case, scale, layouts)
    check_port(options.master_port)
    check_device(options.device, base)
    out_dir = make_out_dir(out, base.name)
    rows = []
    with ForkServer() as server:
        quiet = replace(options, progress=io.StringIO(), server=server)
        for name in names:
            row = _judge(case, name, base, num_steps, expected, out_dir, quiet)
            rows.append(row)
            on_row(row)
    matrix = Matrix(
        f"{base.family}/{base.name}", scale, num_steps, train_iters, tuple(rows), out_dir
    )
    text = json.dumps(matrix.as_json(), indent=1, allow_nan=False)
    write_atomically(out_dir / "verdict.json", text + "\n")
    return matrix


def working_layouts(case: str, scale: str) -> Iterator[str]:
    """Every layout of up to ``MAX_RANKS`` ranks in which the case can be played."""
    trains = load_scenario(case, scale=scale).inference is None
    for degrees in itertools.product(*DEGREES.values()):
        named = dict(zip(DEGREES, degrees, strict=True))
        if named["tp"] * named["pp"] * named["dp"] > MAX_RANKS:
            continue
        for sp in (False, True)[: 1 + (named["tp"] > 1)]:
            for zero1 in (True, False) if trains and named["dp"] > 1 else (None,):
                try:
                    layout = str(Layout.build(**named, sp=sp, zero1=zero1))
                    load_scenario(case, scale=scale, layout=layout)
                except ValueError:
                    continue
                yield layout


def resume_pairs(layouts: Sequence[str]) -> Iterator[str]:
    """``NUM_PAIRS`` changes of layout, spread evenly; saved in far other ones than resumed."""
    num = len(layouts)
    for i in range(min(NUM_PAIRS, num if num > 1 else 0)):
        at = i * num // min(NUM_PAIRS, num)
        yield f"{layouts[at]}>{layouts[(at + num // 2) % num]}"


def _names(case: str, scale: str, layouts: str) -> list[str]:
    match layouts:
        case "all":
            return list(working_layouts(case, scale))
        case "pairs":
            return list(resume_pairs(list(working_layouts(case, scale))))
    return list(dict.fromkeys(name.replace(" ", "") for name in layouts.split(";")))


def _judge(
    case: str,
    name: str,
    base: Scenario,
    num_steps: int,
    expected: Metrics,
    out_dir: Path,
    options: LaunchOptions,
) -> Row:
    layout, _, other = name.partition(">")

    def load(layout: str) -> Scenario:
        choices: dict[str, Any] = {"scale": base.scale, "arithmetic": base.arithmetic}
        loaded = load_scenario(case, layout=layout, **choices)
        if loaded.inference:
            if other:
                raise ValueError("inference does not resume")
            return loaded
        return loaded.first_steps(num_steps, resume=">" in name)

    try:
        scenario = load(layout)
        resumed = load(other) if ">" in name else None
    except ValueError as error:
        return Row(name, "refused", detail=str(error).removeprefix(f"{find_case(case)}: "))
    folder = out_dir / name
    folder.mkdir()
    start = time.monotonic()
    try:
        played = play(scenario, folder, options, resumed)
    except RunFailed as error:
        if error.interrupted:
            raise
        return Row(name, "failed", time.monotonic() - start, str(error))
    wall_s = time.monotonic() - start
    comparison = compare_golden(scenario, expected, played.metrics)
    broken = [check for check in played.checks if not check.passed]
    if comparison.passed and not broken:
        return Row(name, "same", wall_s, comparison=comparison)
    first = str(comparison.differences[0]) if comparison.differences else broken[0].detail
    return Row(name, "differs", wall_s, f"{comparison.summary}: {first}", comparison)
