"""``testbed bench step``: a training step in canonical and in native arithmetic, from one run."""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from scenarios.engines.step_race import SIDES
from scenarios.launch import launch
from scenarios.metrics_file import read_steps
from scenarios.schema import load_scenario
from scenarios.worker import Job

ENGINE = "scenarios.engines.step_race:train"


@dataclass(frozen=True)
class StepRow:
    """One case: medians over the timed steps, in seconds, as rank 0 saw them."""

    case: str
    layout: str
    num_ranks: int
    num_steps: int
    canonical_s: float
    native_s: float
    median_ratio: float
    """Of canonical / native of each step, so that a slower moment of the machine cancels."""


def measure(case: str, *, num_steps: int, warmup: int) -> StepRow:
    """Trains ``warmup + num_steps`` steps of a case at scale ci on both sides in turn.

    Raises:
        ValueError: no such case, or no step to time.
        RunFailed: a rank failed.
    """
    if num_steps < 1 or warmup < 0:
        raise ValueError(
            f"bench step: got -n {num_steps} -w {warmup}, expected 1 or more and 0 or more"
        )
    scenario = load_scenario(case, scale="ci").first_steps(warmup + num_steps)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            scenario=scenario.model_dump_json(),
            run_dir=folder,
            checkpoint_dir=str(Path(folder) / "checkpoints"),
            resume=False,
            engine=ENGINE,
        )
        launch(job, world_size=scenario.layout.world_size)
        steps = read_steps(Path(folder) / "metrics.jsonl")
    timed = [values for step, values in steps.items() if step > warmup]
    sides = [[float(values[f"{side} iteration-time"]) for values in timed] for side in SIDES]
    ratios = [canonical / native for canonical, native in zip(*sides, strict=True)]
    return StepRow(
        f"{scenario.family}/{scenario.name}",
        str(scenario.layout),
        scenario.layout.world_size,
        num_steps,
        statistics.median(sides[0]),
        statistics.median(sides[1]),
        statistics.median(ratios),
    )


def step_lines(row: StepRow) -> list[str]:
    """Both sides and their ratio."""
    return [
        f"# step: {row.case}, ci scale, {row.layout}, {row.num_ranks} ranks, medians of "
        f"{row.num_steps} steps in turn",
        f"#{'canonical':>12} {'native':>12} {'canonical/native':>17}",
        f"#{'(ms)':>12} {'(ms)':>12}",
        f" {1e3 * row.canonical_s:>12.1f} {1e3 * row.native_s:>12.1f} {row.median_ratio:>17.2f}",
    ]
