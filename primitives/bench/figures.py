"""What is told of measured collectives: medians of clean blocks, quantiles of single calls.

A block is clean when processes outside the benchmark used at most ``MAX_FOREIGN`` of all cores
during it; where too few are, the least disturbed count and the row says so. Behind each block some
calls are timed one by one, for the quantiles; in the block itself nobody looks at the clock.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

MAX_FOREIGN = 0.04
LIMITS = ("copy", "copy_stream", "copy@cuda")


@dataclass
class Timing:
    """One contestant in one placement."""

    time_us: float
    """Median over its blocks of ``Block.call_s``."""
    p50_us: float
    p99_us: float
    """Quantiles of the calls that were timed one by one, those of all ranks and blocks together."""
    num_singles: int
    """How many these were; of fewer than 100 the p99 is the longest."""
    wrong: int | None
    """Wrong elements on all ranks; None when not checked."""
    num_blocks: int
    foreign: float
    """Median share of all cores that processes outside the benchmark used meanwhile."""


@dataclass
class Block:
    """What all ranks told of one block of one contestant."""

    foreign: float
    """Share of all cores that processes outside the benchmark used."""
    call_s: float
    """(latest end - earliest start) / calls."""
    singles_us: "np.ndarray[Any, np.dtype[np.float64]]"
    """[ranks x singles]"""


def timing_of(blocks: Sequence[Block], num_blocks: int, wrong: int | None) -> Timing:
    """The figures of all clean blocks, or of the ``num_blocks`` least disturbed ones."""
    ordered = sorted(blocks, key=lambda block: block.foreign)
    num_clean = sum(block.foreign <= MAX_FOREIGN for block in ordered)
    used = ordered[: max(num_clean, min(num_blocks, len(ordered)), 1)]
    singles_us = np.concatenate([block.singles_us for block in used])
    p50_us, p99_us = np.quantile(singles_us, (0.5, 0.99), method="inverted_cdf")  # measured values
    return Timing(
        time_us=1e6 * statistics.median(block.call_s for block in used),
        p50_us=float(p50_us),
        p99_us=float(p99_us),
        num_singles=singles_us.size,
        wrong=wrong,
        num_blocks=len(used),
        foreign=statistics.median(block.foreign for block in used),
    )


@dataclass
class Placement:
    """All contestants out of place, or all in place."""

    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    """What a contestant said that refused the case."""

    @property
    def limit_us(self) -> float | None:
        """The faster copy of as many bytes as must be moved."""
        times = [self.timings[name].time_us for name in LIMITS if name in self.timings]
        return min(times, default=None)


@dataclass
class Row:
    """One size."""

    nbytes: int
    count: int
    out_of_place: Placement | None
    in_place: Placement | None

    @property
    def placements(self) -> list[Placement]:
        """Those that were measured."""
        return [p for p in (self.out_of_place, self.in_place) if p is not None]

    @property
    def num_wrong(self) -> int:
        """Wrong elements of everybody that claims to do the work."""
        return sum(
            timing.wrong or 0
            for placement in self.placements
            for name, timing in placement.timings.items()
            if name != "noop"
        )

    def as_json(self) -> dict[str, object]:
        """The row with its derived figures' ingredients."""
        found: dict[str, object] = asdict(self)
        for name, placement in (("out_of_place", self.out_of_place), ("in_place", self.in_place)):
            if placement is not None:
                found[name] = asdict(placement) | {"limit_us": placement.limit_us}
        return found


__all__ = ["LIMITS", "MAX_FOREIGN", "Block", "Placement", "Row", "Timing", "timing_of"]
