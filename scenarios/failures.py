"""Why a run failed: what each rank died of, which one was the cause, and how to say it."""

import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SYMPTOMS = ("CollectiveTimeout", "PeerLost", "DistBackendError")
"""Errors that a rank gets because another one failed."""


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended.

    ``type`` is the name of the exception, or ``lost`` (killed by ``signal``), ``exited`` (no report
    left), ``hung`` (stopped at the hang limit) or ``stopped`` (by us, after another one failed).
    """

    rank: int
    type: str
    message: str
    step: int | None
    signal: str | None
    exit_code: int | None
    log: str
    time_s: float = 0.0
    """When it was reported (Unix time); 0 without a report."""

    def what(self) -> str:
        """What happened, to be read after the rank's number; the same for ranks that fail alike."""
        if self.type == "lost":
            return f" was lost, killed by {self.signal}"
        if self.type in ("exited", "hung", "stopped"):
            return f" {self.message}"
        return f": {self.type}: {self.message}"


class RunFailed(RuntimeError):
    """Ranks crashed, hung or were interrupted; the message names the root cause first."""

    def __init__(
        self,
        failures: list[RankFailure],
        *,
        last_step: int | None,
        log_dir: Path,
        reason: str = "",
        interrupted: bool = False,
    ) -> None:
        self.failures = sorted(failures, key=_cause_order)
        self.last_step = last_step
        self.log_dir = log_dir
        self.reason = reason
        self.interrupted = interrupted
        super().__init__(self._message())

    def _message(self) -> str:
        when = f"after step {self.last_step}" if self.last_step else "before the first step"
        parts = [f"{self.reason} {when}" if self.reason else ""]
        symptom_told = False
        alike: dict[str, list[RankFailure]] = {}
        for failure in self.failures:
            alike.setdefault(failure.what(), []).append(failure)
        for number, (what, failures) in enumerate(alike.items()):
            kind = failures[0].type
            ranks = ", ".join(map(str, sorted(failure.rank for failure in failures)))
            text = " ".join(f"rank {ranks}{what}".split())
            if number == 0 and not self.reason:
                text += f" {when}"
            elif kind == "stopped" or (kind in SYMPTOMS and symptom_told):
                continue
            # What the first peer saw names the collective; the others saw the same.
            symptom_told |= kind in SYMPTOMS
            parts.append(text)
        parts.append(f"logs: {self.log_dir}")
        return "; ".join(part for part in parts if part)

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json`` and verdict.json."""
        return {
            "message": str(self),
            "last_step": self.last_step,
            "logs": str(self.log_dir),
            "ranks": [asdict(failure) for failure in self.failures],
        }


def signal_name(number: int) -> str:
    """SIGKILL for 9 and so on."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cause_order(failure: RankFailure) -> tuple[int, float, int]:
    """A lost rank explains all others; a peer's complaint explains least; else the first one."""
    if failure.type == "lost":
        order = 0
    elif failure.type in SYMPTOMS:
        order = 2 + SYMPTOMS.index(failure.type)
    elif failure.type == "stopped":
        order = 9
    else:
        order = 1
    return order, failure.time_s, failure.rank
