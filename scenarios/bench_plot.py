"""busbw over size as a picture: ours, the competitors and the limit of the machine."""

import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from primitives.bench.case import bandwidths_gb_s, bus_factor
from primitives.bench.figures import LIMITS
from primitives.bench.measure import Plan
from scenarios.bench_csv import records

ENDINGS = (".png", ".svg", ".html")
MAX_COLUMNS = 3


def check_plot(path: Path, plans: Sequence[Plan]) -> None:
    """Whether there will be a picture, asked before anything is measured.

    Raises:
        click.UsageError: an unknown ending, nothing that has a bandwidth, or no matplotlib.
    """
    if path.suffix not in ENDINGS:
        raise click.UsageError(
            f"--plot: expected a file that ends in {', '.join(ENDINGS)}, got {str(path)!r}"
        )
    if not any(bus_factor(plan.op, plan.num_ranks) for plan in plans):
        raise click.UsageError("--plot: expected a collective that moves bytes between ranks")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise click.UsageError(
            f"--plot needs matplotlib ({error}): pip install 'matplotlib~=3.11'"
        ) from error


def plot_bytes(document: dict[str, Any], ending: str) -> bytes:
    """Draws without a display, both axes logarithmic, one sub-plot for each operation.

    Args:
        document: the JSON document of ``testbed bench``.
        ending: one of ENDINGS; HTML holds the SVG.

    Returns:
        The content of the file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    benchmarks = [
        one for one in document["benchmarks"]
        if bus_factor(one["plan"]["op"], one["plan"]["num_ranks"])
    ]  # fmt: skip
    num_columns = min(MAX_COLUMNS, len(benchmarks))
    num_rows = math.ceil(len(benchmarks) / num_columns)
    figure = Figure(figsize=(6 * num_columns, 4.5 * num_rows), layout="constrained")
    plan = benchmarks[0]["plan"]
    where = ", ".join(sorted(set(document.get("gpus", [])))) or document["cpu"]
    title = f"busbw over size: {plan['num_ranks']} ranks on {where}, {plan['level']} level"
    figure.suptitle(title)
    colors: dict[str, str] = {}
    for number, benchmark in enumerate(benchmarks, start=1):
        _draw(figure.add_subplot(num_rows, num_columns, number), benchmark, colors)
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(picture, format="png" if ending == ".png" else "svg", dpi=120)
    if ending != ".html":
        return picture.getvalue()
    svg = picture.getvalue().decode()
    head = f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
    return (head + svg[svg.index("<svg") :]).encode()


def _draw(axes: Any, benchmark: dict[str, Any], colors: dict[str, str]) -> None:
    plan = benchmark["plan"]
    for name, line in curves(benchmark).items():
        style = {"color": "black", "linestyle": "--"}
        if name != "limit":
            style = {"color": colors.setdefault(name, f"C{len(colors)}"), "marker": "o"}
        axes.plot(*zip(*line, strict=True), label=name, markersize=4, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda nbytes, _: _short(nbytes))
    where = _placement(benchmark).replace("_", " ")
    axes.set(title=f"{plan['op']}, {plan['dtype']}, {where}", xlabel="size (bytes)",
             ylabel="busbw (GB/s)")  # fmt: skip
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()


def curves(benchmark: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(bytes, busbw in GB/s) of each contestant and of the limit, in the placement of the table."""
    found: dict[str, list[tuple[int, float]]] = {}
    limit: dict[int, float] = {}
    for record in records([benchmark]):
        if record["placement"] != _placement(benchmark) or "busbw_gb_s" not in record:
            continue
        op, nbytes, num_ranks = record["op"], record["nbytes"], record["num_ranks"]
        if record["contestant"] not in LIMITS:
            found.setdefault(record["contestant"], []).append((nbytes, record["busbw_gb_s"]))
        else:
            limit[nbytes] = bandwidths_gb_s(op, nbytes, record["limit_us"], num_ranks)[1]
    return found | {"limit": list(limit.items())}


def _placement(benchmark: dict[str, Any]) -> str:
    """The first there is, as to the right of the table."""
    return "in_place" if benchmark["rows"][0]["out_of_place"] is None else "out_of_place"


def _short(nbytes: float) -> str:
    """As the sizes of the command line: 512, 64K, 1M."""
    for unit, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if nbytes >= unit:
            return f"{nbytes / unit:g}{letter}"
    return f"{nbytes:g}"


__all__ = ["check_plot", "curves", "plot_bytes"]
