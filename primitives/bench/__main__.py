"""``python -m primitives.bench``: collectives against gloo, the canonical GEMM against torch.mm."""

from rich.console import Console
from rich.table import Table

from primitives.bench import collectives, gemm

WORLD_SIZE = 4
OPS = ("all_gather", "reduce_scatter", "all_reduce")
NBYTES = (1 << 10, 1 << 16, 1 << 22)
SHAPES = ((256, 48, 128), (256, 128, 128), (512, 512, 512))


def main() -> None:
    console = Console()
    table = Table(title=f"collectives, {WORLD_SIZE} ranks, fp32; limit: copying the bytes moved")
    for column in ("op", "bytes/rank", "ours us", "gloo us", "gloo/ours", "limit us"):
        table.add_column(column, justify="right")
    cases = [(op, nbytes) for op in OPS for nbytes in NBYTES] + [("barrier", 0)]
    for row in collectives.measure(WORLD_SIZE, cases):
        ours, gloo = row.time_us["primitives"], row.time_us["gloo"]
        figures = (f"{ours:.1f}", f"{gloo:.1f}", f"{gloo / ours:.1f}", f"{row.limit_us:.1f}")
        table.add_row(row.op, str(row.nbytes_per_rank), *figures)
    console.print(table)

    table = Table(title="GEMM, one thread, fp32")
    for column in ("m", "n", "k", "ours GFLOP/s", "torch.mm GFLOP/s", "ours/torch"):
        table.add_column(column, justify="right")
    for r in gemm.measure(list(SHAPES)):
        speeds = (r.canonical_gflop_s, r.torch_gflop_s, r.canonical_gflop_s / r.torch_gflop_s)
        table.add_row(str(r.m), str(r.n), str(r.k), *(f"{s:.2f}" for s in speeds))
    console.print(table)


if __name__ == "__main__":
    main()
