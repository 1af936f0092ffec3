"""What ``testbed bench`` prints: nccl-tests' columns, and ours to their right."""

from typing import TYPE_CHECKING

from primitives.bench.case import REDUCING, bandwidths_gb_s
from primitives.bench.figures import MAX_FOREIGN, Placement, Row, Timing
from primitives.bench.measure import Plan

if TYPE_CHECKING:
    from primitives.bench.fused import Row as FusedRow
    from primitives.bench.gemm import Row as GemmRow


def head(plan: Plan) -> list[str]:
    """What is measured, and nccl-tests' column heads with ours to their right."""
    more = "".join(f" {name:>9} {'x':>6}" for name in _others(plan))
    overhead = f"{'raw':>9} {'noop':>9}" if plan.level == "c10d" else ""
    return [
        f"# {plan.op} on {plan.device}: {plan.num_ranks} ranks under {plan.launcher}, "
        f"{plan.level} level; "
        f"medians of up to {plan.num_blocks} blocks",
        f"#{'':47} {'out-of-place':^33} {'in-place':^33}",
        f"#{'size':>11} {'count':>11} {'type':>8} {'redop':>6} {'root':>5}  "
        + f" {'time':>9} {'algbw':>7} {'busbw':>7} {'#wrong':>6}" * 2
        + f" {'limit':>9} {'%':>4} {'p50':>9} {'p99':>9} {overhead} {more}",
        f"#{'(B)':>11} {'(elements)':>11} {'':>8} {'':>6} {'':>5}  "
        + f" {'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7} {'':>6}" * 2
        + f" {'(us)':>9} {'':>4} {'(us)':>9} {'(us)':>9}",
    ]


def _mine(plan: Plan) -> str:
    if plan.device == "cuda":
        return "primitives@cuda"
    return "primitives" if plan.level == "c10d" else "raw"


def _others(plan: Plan) -> list[str]:
    if plan.device == "cuda":
        return [f"{name}@cuda" for name in plan.against]
    absent = plan.jobs()[1]
    return [name for name in plan.against if name not in absent]


def lines_of(plan: Plan, row: Row) -> list[str]:
    """The row, and a line for each thing that puts it in doubt."""
    mine = _mine(plan)
    reduce_op = plan.reduce_op if plan.op in REDUCING else "none"
    root = plan.root if plan.op == "broadcast" else -1
    text = f" {row.nbytes:>11} {row.count:>11} {plan.dtype:>8} {reduce_op:>6} {root:>5}  "
    for placement in (row.out_of_place, row.in_place):
        text += _figures(plan, row, placement.timings[mine] if placement else None)
    # Everything to the right belongs to the first placement there is.
    main = row.placements[0]
    own = main.timings[mine]
    limit_us = main.limit_us
    share = f"{100 * limit_us / own.time_us:.0f}" if limit_us is not None else "-"
    text += f" {_us(limit_us)} {share:>4} {_us(own.p50_us)} {_us(own.p99_us)} "
    if plan.level == "c10d":
        text += f"{_time(main, 'raw')} {_time(main, 'noop')} "
    for name in _others(plan):
        theirs = main.timings.get(name)
        ratio = f"{theirs.time_us / own.time_us:.2f}" if theirs else "-"
        text += f" {_time(main, name)} {ratio:>6}"
    return [text, *_doubts(row, mine)]


def _figures(plan: Plan, row: Row, timing: Timing | None) -> str:
    if timing is None:
        return f" {'-':>9} {'-':>7} {'-':>7} {'-':>6}"
    algbw, busbw = bandwidths_gb_s(plan.op, row.nbytes, timing.time_us, plan.num_ranks)
    wrong = "N/A" if timing.wrong is None else str(timing.wrong)
    return f" {_us(timing.time_us)} {algbw:>7.2f} {busbw:>7.2f} {wrong:>6}"


def _us(time_us: float | None) -> str:
    return f"{'-':>9}" if time_us is None else f"{time_us:>9.{1 if time_us < 1e5 else 0}f}"


def _time(placement: Placement, name: str) -> str:
    timing = placement.timings.get(name)
    return _us(timing.time_us if timing else None)


def _doubts(row: Row, mine: str) -> list[str]:
    found = []
    for placement, where in ((row.out_of_place, "out of place"), (row.in_place, "in place")):
        if placement is None:
            continue
        for name, error in placement.errors.items():
            found.append(f"#  {name}, {where}: {error}")
        for name, timing in placement.timings.items():
            if timing.wrong and name not in (mine, "noop"):
                found.append(f"#  {name}, {where}: {timing.wrong} wrong elements")
        noisy = {n: t for n, t in placement.timings.items() if t.foreign > MAX_FOREIGN}
        if noisy:
            worst = max(timing.foreign for timing in noisy.values())
            found.append(f"#  {where}: other processes used up to {100 * worst:.0f} % of the cores")
    return found


def gemm_lines(rows: "list[GemmRow]") -> list[str]:
    """The canonical GEMM beside torch.mm."""
    lines = [
        f"# gemm: one thread, {rows[0].dtype}",
        f"#{'m':>5} {'n':>5} {'k':>5} {'ours':>9} {'torch.mm':>9} {'ours/torch':>10}   (GFLOP/s)",
    ]
    for row in rows:
        ratio = row.canonical_gflop_s / row.torch_gflop_s
        lines.append(f" {row.m:>5} {row.n:>5} {row.k:>5} {row.canonical_gflop_s:>9.2f} "
                     f"{row.torch_gflop_s:>9.2f} {ratio:>10.2f}")  # fmt: skip
    return lines


def fused_head(row: "FusedRow") -> list[str]:
    """What `fused` measures, by its first row."""
    return [
        "# fused: many odd tensors in one call, beside FSDP2's flat buffers; ms, and times sooner"
        " than the first",
        f"#{'op':>15} {'type':>9} {'elements':>10}  " + " ".join(f"{n:>23}" for n in row.time_ms),
    ]


def fused_line(row: "FusedRow") -> str:
    """One set of parameters."""
    figures = (
        f"{time_ms:>15.2f} {row.ratio(name):>6.1f}x" for name, time_ms in row.time_ms.items()
    )
    return f" {row.case.op:>15} {row.case.dtype:>9} {row.case.numel:>10}  " + " ".join(figures)


__all__ = ["fused_head", "fused_line", "gemm_lines", "head", "lines_of"]
