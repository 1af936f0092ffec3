"""One rank's outcome of one phase of a test, and the one outcome of all ranks."""

from dataclasses import asdict, dataclass
from typing import Any

import pytest

from primitives.lockstep.control import listed

SECTION_LIMIT = 2000  # characters of captured output a rank puts into a failure's text


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
    freed: str
    """Why this rank was freed from a wait, or ""."""
    own: bool
    """Whether the error arose on this rank; else it only follows another rank in step."""

    @classmethod
    def of(cls, report: pytest.TestReport, freed: str, *, own: bool) -> "Outcome":
        text = "" if report.longrepr is None else report.longreprtext
        crash = getattr(report.longrepr, "reprcrash", None)
        headline = text if crash is None else f"{crash.path}:{crash.lineno}: {crash.message}"
        if report.outcome == "failed":
            for title, content in report.sections:
                text += f"\n{title}:\n{content[-SECTION_LIMIT:]}"
        kind: str = report.outcome
        if hasattr(report, "wasxfail") and kind != "failed":
            kind = {"skipped": "xfailed", "passed": "xpassed"}[kind]
        return cls(kind, headline, text, getattr(report, "wasxfail", ""), freed, own)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def merge(report: pytest.TestReport, outcomes: list[Outcome]) -> bool:
    """Turns this rank's report into the one of all ranks, the same on every rank.

    A failure on any rank is a failure; so is a skip or a pass on some ranks only. A test that is
    marked xfail has failed as expected when it did so on any rank.

    Returns:
        Whether the ranks may have left the test at different places.
    """
    kinds = {o.kind for o in outcomes}
    if "failed" in kinds:
        report.outcome, report.longrepr, report.sections = "failed", failure_text(outcomes), []
    elif kinds == {"xfailed", "xpassed"}:
        report.outcome = "skipped"
        report.wasxfail = next(o.reason for o in outcomes if o.kind == "xfailed")
    elif len(kinds) > 1:
        each = "\n".join(f"rank {r}: {o.kind} {o.headline}" for r, o in enumerate(outcomes))
        report.outcome, report.longrepr = "failed", f"the ranks disagree\n{each}"
    else:
        return "xfailed" in kinds
    if report.outcome == "failed":
        report.__dict__.pop("wasxfail", None)
    return True


def failure_text(outcomes: list[Outcome]) -> str:
    failed = [r for r, o in enumerate(outcomes) if o.kind == "failed"]
    unfreed = [r for r in failed if not outcomes[r].freed]
    causes = [r for r in unfreed if outcomes[r].own] or unfreed or failed
    lines = [f"failed on rank {listed(causes)} of {len(outcomes)}"]
    lines += [f"rank {r} was freed: {o.freed}" for r, o in enumerate(outcomes) if o.freed]
    by_headline: dict[str, list[int]] = {}
    for r in causes:
        by_headline.setdefault(outcomes[r].headline, []).append(r)
    for ranks in by_headline.values():  # the same error is shown once, as the first rank saw it
        lines.append(f"---- rank {listed(ranks)} ----\n{outcomes[ranks[0]].text}")
    return "\n".join(lines)
