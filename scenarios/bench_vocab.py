"""What ``testbed bench vocab_entropy`` prints."""

import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from primitives.bench.vocab_entropy import Case, Row
    from primitives.bench.vocab_head import Row as HeadRow


def bench_vocab(num_rounds: int, device: str, as_json: bool) -> list[dict[str, Any]]:
    """Measures every case, prints it unless ``as_json``, and returns the rows.

    Raises:
        ValueError: nothing can be measured on that device here.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts collectives
    from primitives.bench import devices, vocab_entropy  # imports torch

    on = devices.device_named(device)
    cases = vocab_entropy.CUDA_CASES if device == "cuda" else vocab_entropy.CASES
    found = []
    if not as_json:
        click.echo("\n".join(vocab_head(device)))
    rows = vocab_entropy.measure(list(cases), num_rounds, on)
    for _, group in groupby(rows, key=lambda row: row.case):
        of_case = list(group)
        found += [asdict(row) for row in of_case]
        if not as_json:
            click.echo("\n".join(vocab_lines(of_case)))
    return found


def bench_head(num_rounds: int, as_json: bool) -> list[dict[str, Any]]:
    """The same fused with the LM head: measures, prints unless ``as_json``, returns the rows."""
    from primitives.bench import vocab_head as head  # imports torch

    found = []
    for case in head.CASES:
        rows = head.measure(case, num_rounds)
        found += [asdict(row) for row in rows]
        if not as_json:
            click.echo("\n".join(head_lines(rows)))
    return found


def vocab_head(device: str) -> list[str]:
    """What is measured, and the columns."""
    where = "one thread" if device == "cpu" else device
    return [
        f"# vocab_entropy: entropy and log-probability; {where}, a group of one rank",
        f"#{'':>30} {'forward':^22} {'backward':^22}",
        f"#{'tokens':>6} {'vocab':>7} {'dtype':>9} " + f" {'ms':>8} {'GB/s':>7} {'%':>4} " * 2
        + f" {'ms':>8} {'x':>5} {'memory':>7} {'calls':>5}",
    ]  # fmt: skip


def vocab_lines(rows: "list[Row]") -> Iterator[str]:
    """The rows of one case, the limits first; x: how often the first row's time fits in."""
    best = rows[0]
    yield f"# {_case(best.case)}: limits " + ", ".join(
        f"{name} {best.limit_ms[name]:.2f} ms" for name in best.limit_ms
    )
    for row in rows:
        memory = "-" if row.extra_nbytes is None else f"{row.extra_nbytes / row.case.nbytes:.2f}"
        yield (
            f" {row.case.num_tokens:>6} {row.case.vocab_size:>7} {row.case.dtype:>9} "
            f" {row.forward_ms:>8.2f} {row.forward_gb_s:>7.2f} {100 * row.forward_share:>4.0f} "
            f" {row.backward_ms:>8.2f} {row.backward_gb_s:>7.2f} {100 * row.backward_share:>4.0f} "
            f" {row.ms:>8.2f} {row.ms / best.ms:>5.1f} {memory:>7} {row.num_collectives:>5}"
            f"  {row.contestant}"
        )


def head_lines(rows: "list[HeadRow]") -> Iterator[str]:
    """A case of the LM head; x: how often the first row's time fits in."""
    case, best = rows[0].case, rows[0]
    yield (
        f"# LM head, forward: {case.num_tokens} tokens, hidden {case.hidden_size}, "
        f"vocab {case.vocab_size}, {case.dtype}, one thread"
    )
    yield f"#{'ms':>9} {'x':>5} {'GFLOP/s':>8} {'MB':>8}"
    for row in rows:
        memory = "-" if row.extra_nbytes is None else f"{row.extra_nbytes / 1e6:.0f}"
        yield (
            f" {row.ms:>9.1f} {row.ms / best.ms:>5.2f} {row.gflop_s:>8.1f} {memory:>8}"
            f"  {row.contestant}"
        )


def _case(case: "Case") -> str:
    return f"{case.num_tokens} x {case.vocab_size} {case.dtype}"
