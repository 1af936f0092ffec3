"""``testbed bench``: nccl-tests' flags; as a table, JSON, CSV and a plot."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from primitives.bench.case import DTYPES, OPS, REDUCE_OPS
from primitives.bench.measure import Plan, absent_message, measure
from scenarios.bench_csv import csv_text
from scenarios.bench_decode import bench_decode
from scenarios.bench_plot import check_plot, plot_bytes
from scenarios.bench_tables import fused_head, fused_line, gemm_lines, head, lines_of
from scenarios.bench_vocab import bench_head, bench_vocab
from scenarios.golden import write_atomically
from scenarios.provenance import cpu_model, gpu_models, versions

BENCHMARKS = [*OPS, "gemm", "fused", "vocab_entropy", "decode", "checkpoint", "step"]
GEMM_SHAPES = ((256, 48, 128), (256, 128, 128), (512, 512, 512))
GEMM_DTYPES = ("float", "half", "bfloat16")


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


class OutputFile(click.Path):
    """A file in an existing folder: a wrong one is found before anything is measured."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; fails with what was expected."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"expected a file in an existing folder, got {str(path)!r}", param, ctx)
        return path


SIZE = Size()
FILE = OutputFile(dir_okay=False)


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
    type=FILE,
    help="Write everything measured as JSON.",
)
@click.option("--csv", "csv_file", type=FILE, help="Write every contestant's figures as CSV.")
@click.option("--plot", "plot_file", type=FILE, help="Draw busbw over size: .png, .svg or .html.")
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
    "none; on cuda of nccl, symmetric, none; commas between "
    "[c10d: gloo; communicator: mpi; cuda: none].",
)
@click.option("--case", default="S1", show_default=True, help="What `step` trains, at scale ci.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where collectives, fused and vocab_entropy run.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def bench(
    op: tuple[str, ...],
    factor: int | None,
    step_nbytes: int | None,
    check: int,
    output: Path | None,
    csv_file: Path | None,
    plot_file: Path | None,
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
    on_cpu = [name for name in op if name not in (*OPS, "fused", "vocab_entropy")]
    if device == "cuda" and on_cpu:
        raise click.UsageError(
            "--device cuda: collectives, fused and vocab_entropy run there, got "
            + ", ".join(on_cpu)
        )
    if "gemm" in op and given["dtype"] not in GEMM_DTYPES:
        raise click.UsageError(
            f"-d: expected one of {', '.join(GEMM_DTYPES)} for gemm, got {given['dtype']}"
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
    if csv_file is not None and not plans:
        raise click.UsageError(f"--csv: expected a collective, got {', '.join(op)}")
    if plot_file is not None:
        check_plot(plot_file, plans)
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

        gemm_rows = gemm.measure(list(GEMM_SHAPES), DTYPES[given["dtype"]])
        document["gemm"] = [asdict(row) for row in gemm_rows]
        if not as_json:
            click.echo("\n".join(gemm_lines(gemm_rows)))
    if "fused" in op:
        from primitives.bench import fused

        of_ranks = given["num_ranks"]
        rows = fused.measure(of_ranks, list(fused.CASES), given["num_blocks"], device)
        document["fused"] = [asdict(fused_row) for fused_row in rows]
        if not as_json:
            click.echo("\n".join([*fused_head(rows[0]), *map(fused_line, rows)]))
    if "vocab_entropy" in op:
        document["vocab_entropy"] = bench_vocab(given["num_blocks"], device, as_json)
        if device == "cpu":
            document["vocab_head"] = bench_head(given["num_blocks"], as_json)
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
    if csv_file is not None:
        write_atomically(csv_file, csv_text(document["benchmarks"]))
    if plot_file is not None:
        write_atomically(plot_file, plot_bytes(document, plot_file.suffix))
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


__all__ = ["bench"]
