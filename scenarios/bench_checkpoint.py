"""``testbed bench checkpoint``: what is printed of a comparison of savers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from primitives.bench.checkpoint import Result


def checkpoint_lines(result: "Result") -> list[str]:
    """Every contestant beside ``dcp.save``."""
    base = result.figures["dcp.save"].save_s
    lines = [
        f"# checkpoint: {result.nbytes / 1e9:.2f} GB of model and optimizer, {result.num_ranks} "
        f"ranks, into {result.folder}; medians of {result.num_rounds} rounds in turn",
        f"#{'':>12} {'save':>8} {'/ dcp':>6} {'GB/s':>6} {'blocked':>8} {'/ dcp':>6} "
        f"{'first':>8} {'extra memory':>13}",
        f"#{'':>12} {'(s)':>8} {'':>6} {'':>6} {'(s)':>8} {'':>6} {'(s)':>8} {'(MB a rank)':>13}",
    ]
    for name, row in result.figures.items():
        lines.append(
            f" {name:>12} {row.save_s:>8.3f} {row.save_s / base:>6.2f} "
            f"{result.nbytes / row.save_s / 1e9:>6.2f} {row.blocked_s:>8.3f} "
            f"{row.blocked_s / base:>6.2f} {row.first_blocked_s:>8.3f} "
            f"{row.extra_nbytes / 1e6:>13.1f}"
        )
    return lines
