"""What each rank brings to a meeting, and the one outcome that all ranks make of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from primitives.lockstep.control import listed

SECTION_LIMIT = 2000  # characters of captured output a rank puts into a failure's text


@dataclass(frozen=True)
class Arrival:
    """How one rank came to a meeting; times are of the machine's one monotonic clock."""

    value: Any
    at: float
    """When it came."""
    freed: str
    """Why it was freed from a wait before, or ""."""
    freed_at: float | None


def causes(arrivals: Sequence[Arrival], failed: list[int]) -> list[int]:
    """Those of the ``failed`` ranks that failed by themselves; may be none.

    A rank that was freed did not, nor one that failed after another rank had freed itself: its
    process groups lost a member.
    """
    first_freed = min((a.freed_at for a in arrivals if a.freed_at is not None), default=None)
    return [
        r
        for r in failed
        if not arrivals[r].freed and (first_freed is None or arrivals[r].at < first_freed)
    ]


@dataclass(frozen=True)
class Outcome:
    """One rank's outcome of a phase (setup, call, teardown), as it travels between the ranks."""

    kind: str
    """passed, failed, skipped, xfailed or xpassed."""
    headline: str
    """The error without its traceback."""
    text: str
    """The error as pytest prints it, with what the rank printed."""
    reason: str
    """Of an expected failure."""
    own: bool
    """Whether the error arose on this rank; else it only follows another rank in step."""

    @classmethod
    def of(cls, report: pytest.TestReport, *, own: bool) -> "Outcome":
        text = "" if report.longrepr is None else report.longreprtext
        crash = getattr(report.longrepr, "reprcrash", None)
        headline = text if crash is None else f"{crash.path}:{crash.lineno}: {crash.message}"
        if report.outcome == "failed":
            for title, content in report.sections:
                text += f"\n{title}:\n{content[-SECTION_LIMIT:]}"
        kind: str = report.outcome
        if hasattr(report, "wasxfail") and kind != "failed":
            kind = {"skipped": "xfailed", "passed": "xpassed"}[kind]
        return cls(kind, headline, text, getattr(report, "wasxfail", ""), own)


def merge(report: pytest.TestReport, arrivals: list[Arrival]) -> bool:
    """Turns this rank's report into the one of all ranks, the same on every rank.

    A failure on any rank is a failure; so is a skip or a pass on some ranks only. A test that is
    marked xfail has failed as expected when it did so on any rank.

    Args:
        report: this rank's.
        arrivals: of all ranks, with an Outcome's fields as value.

    Returns:
        Whether the ranks may have left the test at different places.
    """
    outcomes = [Outcome(**a.value) for a in arrivals]
    kinds = {o.kind for o in outcomes}
    if kinds == {"xfailed", "xpassed"}:
        report.outcome = "skipped"
        report.wasxfail = next(o.reason for o in outcomes if o.kind == "xfailed")
    elif "failed" in kinds or len(kinds) > 1:
        report.outcome, report.sections = "failed", []
        report.__dict__.pop("wasxfail", None)
        if "failed" in kinds:
            report.longrepr = failure_text(arrivals, outcomes)
        else:
            each = "\n".join(f"rank {r}: {o.kind} {o.headline}" for r, o in enumerate(outcomes))
            report.longrepr = f"the ranks disagree\n{each}"
    return kinds not in ({"passed"}, {"skipped"}) or any(a.freed for a in arrivals)


def failure_text(arrivals: list[Arrival], outcomes: list[Outcome]) -> str:
    failed = [r for r, o in enumerate(outcomes) if o.kind == "failed"]
    blamed = causes(arrivals, failed) or failed
    blamed = [r for r in blamed if outcomes[r].own] or blamed
    lines = [f"failed on rank {listed(blamed)} of {len(outcomes)}"]
    lines += [f"rank {r} was freed: {a.freed}" for r, a in enumerate(arrivals) if a.freed]
    lines += [
        f"rank {r} followed: {outcomes[r].headline}"
        for r in failed
        if r not in blamed and outcomes[r].own and not arrivals[r].freed
    ]
    by_headline: dict[str, list[int]] = {}
    for r in blamed:
        by_headline.setdefault(outcomes[r].headline, []).append(r)
    for ranks in by_headline.values():  # the same error is shown once, as the first rank saw it
        lines.append(f"---- rank {listed(ranks)} ----\n{outcomes[ranks[0]].text}")
    return "\n".join(lines)
