"""``testbed bench``: nccl-tests' flags and columns, competitors and the copy limit beside."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from primitives.bench.case import DTYPES, OPS, REDUCE_OPS, REDUCING, bus_factor
from primitives.bench.measure import (
    MAX_FOREIGN,
    Placement,
    Plan,
    Row,
    Timing,
    absent_message,
    measure,
)
from scenarios.bench_decode import bench_decode
from scenarios.bench_vocab import bench_vocab
from scenarios.golden import write_atomically
from scenarios.provenance import cpu_model, gpu_models, versions

if TYPE_CHECKING:
    from primitives.bench.fused import Row as FusedRow
    from primitives.bench.gemm import Row as GemmRow

BENCHMARKS = [*OPS, "gemm", "fused", "vocab_entropy", "decode", "checkpoint", "step"]
GEMM_SHAPES = ((256, 48, 128), (256, 128, 128), (512, 512, 512))


class Size(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes: 8, 64K, 128M, 1G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; fails with what was expected."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([KMG]?)B?", str(value).upper())
        if match is None:
            self.fail(f"expected a size like 8, 64K, 128M or 1G, got {value!r}", param, ctx)
        return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


SIZE = Size()


@click.command()
@click.argument("op", type=click.Choice(BENCHMARKS), metavar="OP...", nargs=-1, required=True)
@click.option("-b", "--minbytes", "min_nbytes", type=SIZE, default="8", show_default=True)
@click.option("-e", "--maxbytes", "max_nbytes", type=SIZE, default="128M", show_default=True)
@click.option("-f", "--stepfactor", "factor", type=int, help="Each size times this [2].")
@click.option("-i", "--stepbytes", "step_nbytes", type=SIZE, help="Each size plus this.")
@click.option(
    "-d", "--datatype", "dtype", type=click.Choice(list(DTYPES)), default="float", show_default=True
)
@click.option(
    "-o", "--op", "reduce_op", type=click.Choice(REDUCE_OPS), default="sum", show_default=True
)
@click.option("-r", "--root", type=int, default=0, show_default=True)
@click.option(
    "-n",
    "--iters",
    "num_blocks",
    type=int,
    default=20,
    show_default=True,
    help="Timed blocks of calls, about 50 ms each; the figure is their median.",
)
@click.option("-w", "--warmup_iters", "warmup", type=int, default=5, show_default=True)
@click.option(
    "-c",
    "--check",
    type=click.IntRange(0, 1),
    default=1,
    show_default=True,
    help="Check the results; any wrong element makes the exit code 1.",
)
@click.option(
    "-J",
    "--output_file",
    "output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write everything measured as JSON.",
)
@click.option("--ranks", "num_ranks", type=int, default=4, show_default=True)
@click.option(
    "--launcher", type=click.Choice(["mp", "torchrun", "mpirun"]), default="mp", show_default=True
)
@click.option(
    "--level",
    type=click.Choice(["c10d", "communicator"]),
    default="c10d",
    show_default=True,
    help="c10d: torch.distributed; communicator: without it.",
)
@click.option(
    "--against",
    default=None,
    help="Of gloo, symmetric (ours on symmetric memory), openmpi, mpich, impi, mpi (all three), "
    "none; on cuda of nccl, none; commas between "
    "[c10d: gloo; communicator: mpi; cuda: none].",
)
@click.option("--case", default="S1", show_default=True, help="What `step` trains, at scale ci.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where collectives and vocab_entropy run.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def bench(
    op: tuple[str, ...],
    factor: int | None,
    step_nbytes: int | None,
    check: int,
    output: Path | None,
    level: str,
    against: str | None,
    case: str,
    device: str,
    as_json: bool,
    **given: Any,
) -> int:  # fmt: skip
    """Times collectives beside competitors and the limit; gemm, checkpoint... beside torch.

    Sizes, algbw and busbw are those of nccl-tests; docs/performance.md derives every column.
    """
    on_cpu = [name for name in op if name not in (*OPS, "vocab_entropy")]
    if device == "cuda" and on_cpu:
        raise click.UsageError(
            f"--device cuda: collectives and vocab_entropy run there, got {', '.join(on_cpu)}"
        )
    _check_device(device)
    if factor is None and step_nbytes is None:
        factor = 2
    usual = {"cuda": "none", "cpu": "gloo" if level == "c10d" else "mpi"}
    against = against or usual[device]
    plans = [
        Plan(
            op=name, factor=factor, step_nbytes=step_nbytes, check=bool(check), level=level,
            against=_contestants(against), device=device, **given,
        )
        for name in op
        if name in OPS
    ]  # fmt: skip
    document: dict[str, Any] = {"cpu": cpu_model(), "versions": versions(), "benchmarks": []}
    if device == "cuda":
        document["gpus"] = gpu_models()
    absent = plans[0].jobs()[1] if plans else []
    if absent and not as_json:
        click.echo(f"# {absent_message(absent)}")
    begun: Plan | None = None
    num_wrong = 0
    for plan, row in measure(plans) if plans else ():
        if plan is not begun:
            begun = plan
            document["benchmarks"].append({"plan": asdict(plan), "absent": absent, "rows": []})
            if not as_json:
                click.echo("\n".join(head(plan)))
        document["benchmarks"][-1]["rows"].append(row.as_json())
        num_wrong += row.num_wrong
        if not as_json:
            click.echo("\n".join(lines_of(plan, row)))
    if "gemm" in op:
        from primitives.bench import gemm  # imports torch

        gemm_rows = gemm.measure(list(GEMM_SHAPES))
        document["gemm"] = [asdict(row) for row in gemm_rows]
        if not as_json:
            click.echo("\n".join(gemm_lines(gemm_rows)))
    if "fused" in op:
        from primitives.bench import fused

        if not as_json:
            click.echo("\n".join(fused_head()))
        document["fused"] = []
        of_ranks = given["num_ranks"]
        for fused_row in fused.measure(of_ranks, list(fused.CASES), given["num_blocks"]):
            document["fused"].append(asdict(fused_row))
            if not as_json:
                click.echo(fused_line(fused_row))
    if "vocab_entropy" in op:
        document["vocab_entropy"] = bench_vocab(given["num_blocks"], device, as_json)
    if "decode" in op:
        document["decode"] = bench_decode(given["num_blocks"], as_json)
    if "step" in op:
        from scenarios.bench_step import measure as measure_step
        from scenarios.bench_step import step_lines

        step = measure_step(case, num_steps=given["num_blocks"], warmup=given["warmup"])
        document["step"] = asdict(step)
        if not as_json:
            click.echo("\n".join(step_lines(step)))
    if "checkpoint" in op:
        from primitives.bench import checkpoint
        from scenarios.bench_checkpoint import checkpoint_lines

        saved = checkpoint.measure(given["num_ranks"], given["max_nbytes"], given["num_blocks"])
        document["checkpoint"] = asdict(saved)
        if not as_json:
            click.echo("\n".join(checkpoint_lines(saved)))
    if num_wrong and not as_json:
        click.echo(f"# {num_wrong} wrong elements", err=True)
    document["num_wrong"] = num_wrong
    text = json.dumps(document, indent=1, allow_nan=False)
    if output is not None:
        write_atomically(output, text + "\n")
    if as_json:
        click.echo(text)
    return 1 if num_wrong else 0


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    from primitives.bench import devices  # imports torch

    try:
        devices.device_named(device)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _contestants(against: str) -> tuple[str, ...]:
    names: list[str] = []
    for name in filter(None, against.split(",")):
        names += ["openmpi", "mpich", "impi"] if name == "mpi" else [name]
    return tuple(dict.fromkeys(name for name in names if name != "none"))


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
        + f" {'limit':>9} {'%':>4} {overhead} {more}",
        f"#{'(B)':>11} {'(elements)':>11} {'':>8} {'':>6} {'':>5}  "
        + f" {'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7} {'':>6}" * 2
        + f" {'(us)':>9}",
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
    own_us = main.timings[mine].time_us
    limit_us = main.limit_us
    share = f"{100 * limit_us / own_us:.0f}" if limit_us is not None else "-"
    text += f" {_us(limit_us)} {share:>4} "
    if plan.level == "c10d":
        text += f"{_time(main, 'raw')} {_time(main, 'noop')} "
    for name in _others(plan):
        theirs = main.timings.get(name)
        ratio = f"{theirs.time_us / own_us:.2f}" if theirs else "-"
        text += f" {_time(main, name)} {ratio:>6}"
    return [text, *_doubts(row, mine)]


def _figures(plan: Plan, row: Row, timing: Timing | None) -> str:
    if timing is None:
        return f" {'-':>9} {'-':>7} {'-':>7} {'-':>6}"
    algbw = row.nbytes / timing.time_us / 1e3
    busbw = algbw * bus_factor(plan.op, plan.num_ranks)
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
    lines = ["# gemm: one thread, float", f"#{'m':>5} {'n':>5} {'k':>5} {'ours':>9} {'torch.mm':>9}"
             f" {'ours/torch':>10}   (GFLOP/s)"]  # fmt: skip
    for row in rows:
        ratio = row.canonical_gflop_s / row.torch_gflop_s
        lines.append(f" {row.m:>5} {row.n:>5} {row.k:>5} {row.canonical_gflop_s:>9.2f} "
                     f"{row.torch_gflop_s:>9.2f} {ratio:>10.2f}")  # fmt: skip
    return lines


FUSED = ("fsdp2 gloo", "fsdp2 primitives", "fused", "fused symmetric")


def fused_head() -> list[str]:
    """What `fused` measures."""
    return [
        "# fused: many odd tensors in one call, beside FSDP2's flat buffers; ms, and times sooner"
        " than fsdp2 gloo",
        f"#{'op':>15} {'type':>9} {'elements':>10}  " + " ".join(f"{n:>23}" for n in FUSED),
    ]


def fused_line(row: "FusedRow") -> str:
    """One set of parameters."""
    figures = (f"{row.time_ms[name]:>15.2f} {row.ratio(name):>6.1f}x" for name in FUSED)
    return f" {row.case.op:>15} {row.case.dtype:>9} {row.case.numel:>10}  " + " ".join(figures)


__all__ = ["bench", "gemm_lines", "head", "lines_of"]
