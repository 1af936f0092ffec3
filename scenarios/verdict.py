"""What was checked and with what outcome: for people as text, for programs as JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenarios.compare import Comparison

SHOWN = 5


@dataclass(frozen=True)
class Check:
    """One thing that was judged."""

    name: str
    passed: bool
    detail: str
    comparison: Comparison | None = None

    @classmethod
    def of(cls, name: str, comparison: Comparison, what: str = "") -> "Check":
        """A check that passes if a comparison does."""
        detail = f"{comparison.summary}{what}"
        return cls(name, comparison.passed, detail, comparison)

    def lines(self) -> list[str]:
        """The outcome, then the first differences."""
        lines = [f"  {'pass' if self.passed else 'FAIL'}  {self.name}: {self.detail}"]
        if self.comparison:
            lines += difference_lines(self.comparison, indent="          ")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Plain values; all differences."""
        differences = self.comparison.differences if self.comparison else ()
        return {
            "name": self.name,
            "passed": self.passed,
            "detail": self.detail,
            "differences": [difference.as_json() for difference in differences],
        }


@dataclass(frozen=True)
class Verdict:
    """The outcome of one scenario."""

    case: str
    scale: str
    layout: str
    num_ranks: int
    out_dir: Path
    runs: tuple[tuple[str, float], ...]
    """(what was run, wall time in seconds)"""
    checks: tuple[Check, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """True if at least one check was made and none failed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def exit_code(self) -> int:
        """0 pass, 1 mismatch."""
        return 0 if self.passed else 1

    def lines(self) -> list[str]:
        """The verdict as text."""
        ranks = "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        lines = [self.case, f"  {self.scale} scale, {self.layout}, {ranks}"]
        lines += [f"  {wall_s:5.1f} s {what}" for what, wall_s in self.runs]
        for check in self.checks:
            lines += check.lines()
        lines += [f"  note: {self.note}"] if self.note else []
        word = "PASS" if self.passed else "FAIL"
        return [*lines, f"{word}  ({self.out_dir})"]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "case": self.case,
            "scale": self.scale,
            "layout": self.layout,
            "num_ranks": self.num_ranks,
            "verdict": "pass" if self.passed else "fail",
            "exit_code": self.exit_code,
            "runs": [{"run": what, "wall_s": wall_s} for what, wall_s in self.runs],
            "checks": [check.as_json() for check in self.checks],
            "note": self.note,
            "out_dir": str(self.out_dir),
        }


def difference_lines(comparison: Comparison, indent: str = "") -> list[str]:
    """The first differences in full, then how many more there are."""
    lines = [f"{indent}{difference}" for difference in comparison.differences[:SHOWN]]
    more = len(comparison.differences) - SHOWN
    return [*lines, f"{indent}and {more} more"] if more > 0 else lines
