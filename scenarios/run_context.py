"""What an engine gets besides the scenario: where to write, whether to resume, how to log."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

LogValue = float | int | str | None


@dataclass(frozen=True)
class RunContext:
    """One run of one scenario, equal on all ranks except for ``log``.

    ``log(step, metrics)`` is called once a step by rank 0's engine, with steps counting up by one
    (from 1, or from the resumed step + 1); on other ranks it does nothing. A metric that has no
    value because the optimizer step was skipped is None; a tensor digest is lower-case hex.
    """

    out_dir: Path
    """Folder of this run, for files of its own."""
    checkpoint_dir: Path
    """Root of the checkpoints, shared by the runs of a scenario."""
    resume: bool
    """Continue from the newest checkpoint instead of starting at step 1."""
    log: Callable[[int, Mapping[str, LogValue]], None]
    device: str = "cpu"
    """Where this rank trains: cpu, or cuda and a number."""
