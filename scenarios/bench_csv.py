"""The figures of collectives as flat records: a line of CSV for each contestant."""

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any

from primitives.bench.case import REDUCING, bandwidths_gb_s

PLACEMENTS = ("out_of_place", "in_place")
OF_PLAN = ("op", "device", "num_ranks", "launcher", "level", "dtype", "reduce_op", "root")
OF_TIMING = ("time_us", "p50_us", "p99_us", "num_singles", "num_blocks", "foreign", "wrong")
COLUMNS = (
    *OF_PLAN, "nbytes", "count", "placement", "contestant", *OF_TIMING,
    "algbw_gb_s", "busbw_gb_s", "limit_us", "limit_percent", "error",
)  # fmt: skip
"""Of the CSV; new ones are added at the end."""


def records(benchmarks: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One record for each (operation, size, placement, contestant).

    Args:
        benchmarks: as in the JSON document of ``testbed bench``.

    Returns:
        Values by column; what does not apply is left out.
    """
    for benchmark in benchmarks:
        plan = benchmark["plan"]
        for row in benchmark["rows"]:
            for where in PLACEMENTS:
                if row[where] is None:
                    continue
                same = {name: plan[name] for name in OF_PLAN} | {
                    "reduce_op": plan["reduce_op"] if plan["op"] in REDUCING else "none",
                    "root": plan["root"] if plan["op"] == "broadcast" else -1,
                    "nbytes": row["nbytes"], "count": row["count"], "placement": where,
                }  # fmt: skip
                for name, timing in row[where]["timings"].items():
                    limit_us = row[where]["limit_us"]
                    yield same | {"contestant": name} | _figures(plan, row, timing, limit_us, name)
                for name, error in row[where]["errors"].items():
                    yield same | {"contestant": name, "error": error}


def _figures(
    plan: dict[str, Any], row: dict[str, Any], timing: dict[str, Any], limit_us: float | None,
    name: str,
) -> dict[str, Any]:  # fmt: skip
    found = {key: timing[key] for key in OF_TIMING}
    if name == "noop":  # moves nothing: it has a time and no bandwidth
        return found
    time_us = timing["time_us"]
    algbw, busbw = bandwidths_gb_s(plan["op"], row["nbytes"], time_us, plan["num_ranks"])
    found |= {"algbw_gb_s": algbw, "busbw_gb_s": busbw}
    if limit_us is not None:
        found |= {"limit_us": limit_us, "limit_percent": 100 * limit_us / time_us}
    return found


def csv_text(benchmarks: Iterable[dict[str, Any]]) -> str:
    """A head line of COLUMNS and a line for each record; numbers read back as the same bits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(benchmarks))
    return text.getvalue()


__all__ = ["COLUMNS", "csv_text", "records"]
