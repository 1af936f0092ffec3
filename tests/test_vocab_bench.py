"""``testbed bench vocab_entropy``: what is compared is the same work, and how figures derive."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from primitives import _C, vocab_parallel
from primitives.bench import vocab_entropy as bench
from primitives.bench import vocab_head as head
from primitives.bench.devices import LIMITS, Cpu
from scenarios.bench_vocab import head_lines, vocab_head, vocab_lines
from scenarios.cli import EXIT_PASS, EXIT_USAGE, main

SMALL = bench.Case(7, 1200)


def test_every_contestant_does_the_same_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CASES", (SMALL, bench.Case(3, 1200, "bfloat16")))
    monkeypatch.setattr(head, "CASES", (head.Case(5, 24, 1200),))
    output = tmp_path / "out.json"
    assert main(["bench", "vocab_entropy", "-n", "2", "-J", str(output)]) == EXIT_PASS
    printed = capfd.readouterr().out
    written = json.loads(output.read_text())
    fused = [row["contestant"] for row in written["vocab_head"]]
    assert fused == ["fused", "logits first", "torch", head.PRODUCT]
    assert all(0 < row["ms"] < 1e5 for row in written["vocab_head"])
    assert "# LM head, forward: 5 tokens, hidden 24, vocab 1200, bfloat16" in printed
    rows = written["vocab_entropy"]
    names = {row["contestant"] for row in rows}
    assert {"in place", "out of place", "torch", "torch.compile"} <= names
    assert len(rows) == 2 * len(names)
    for row in rows:
        assert row["contestant"] in printed
        assert 0 < row["forward_ms"] < 1e5
        assert 0 < row["backward_ms"] < 1e5
        assert set(row["limit_ms"]) == set(LIMITS)
    calls = {row["contestant"]: row["num_collectives"] for row in rows}
    assert calls["in place"] == calls["out of place"] == 1
    assert calls["torch"] == 0


def test_a_contestant_that_computes_something_else_is_refused() -> None:
    right = (torch.ones(3), -torch.ones(3))
    bench.check("right", right, right)
    bench.check("no entropy", (torch.full((3,), torch.nan), right[1]), right)
    with pytest.raises(AssertionError, match="wrong: log_prob is off by"):
        bench.check("wrong", (right[0], torch.zeros(3)), right)


def test_columns_derive_from_what_was_measured() -> None:
    limits = {"read": 1.0, "read + write": 3.0}
    case = bench.Case(1000, 1000)  # 4 MB
    row = bench.Row(case, "in place", 2.0, 4.0, 2_000_000, 1, limits)
    line = list(vocab_lines([row, bench.Row(case, "b", 8.0, 10.0, None, 6, limits)]))
    assert line[1].split() == [
        "1000", "1000", "float32", "2.00", "2.00", "50", "4.00", "2.00", "75", "6.00", "1.0",
        "0.50", "1", "in", "place",
    ]  # fmt: skip
    assert line[2].split()[10:] == ["3.0", "-", "6", "b"]
    assert "limits read 1.00 ms" in line[0]
    assert len(vocab_head("cpu")) == 3


def test_lines_of_the_head_derive_from_what_was_measured() -> None:
    case = head.Case(1000, 1000, 1000)  # 2 GFLOP
    rows = [head.Row(case, "fused", 20.0, 3_000_000), head.Row(case, "other", 30.0, None)]
    lines = [line.split() for line in head_lines(rows)]
    assert lines[2:] == [
        ["20.0", "1.00", "100.0", "3", "fused"],
        ["30.0", "1.50", "66.7", "-", "other"],
    ]


def test_backward_in_place_allocates_nothing_of_the_size_of_the_logits() -> None:
    case = bench.Case(64, 160_000)  # 41 MB: beyond what malloc keeps for itself
    cpu = Cpu()
    held = bench.Bench(case, cpu)

    def both(inplace: bool) -> int:
        def function(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            return vocab_parallel.entropy_and_log_prob(logits, labels, inplace_backward=inplace)

        held.run(function)
        grown = cpu.extra_nbytes(lambda: held.run(function))
        assert grown is not None, "the peak of the resident set cannot be read here"
        return grown

    assert both(True) < case.nbytes / 10
    assert case.nbytes * 0.9 < both(False) < case.nbytes * 1.2


def test_a_device_that_is_not_there_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "vocab_entropy", "gemm", "--device", "cuda"]) == EXIT_USAGE
    assert (
        "--device cuda: collectives, fused and vocab_entropy run there, got gemm"
        in capfd.readouterr().err
    )
    if not _C.cuda_built or not torch.cuda.is_available():
        for name in ("vocab_entropy", "all_reduce"):
            assert main(["bench", name, "--device", "cuda"]) == EXIT_USAGE
            assert "--device cuda: " in capfd.readouterr().err
