"""The kernels of native arithmetic: those of canonical arithmetic, one by one, to rounding."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from primitives import arithmetic, canonical, native
from primitives.arithmetic import kernels

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PARTS, TOKENS, WIDTH, HIDDEN = 8, 32, 12, 48


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def calls(dtype: torch.dtype) -> dict[str, Callable[[Any], Any]]:
    """Name of a kernel -> a call of it on the given module."""
    x, dy = (normal(TOKENS, HIDDEN, seed=i, dtype=dtype) for i in (1, 2))
    weight, bias = (normal(HIDDEN, seed=i, dtype=dtype) for i in (3, 4))
    by_part = normal(PARTS, WIDTH, HIDDEN, seed=5, dtype=dtype)
    logits = normal(PARTS, TOKENS, WIDTH, seed=6, dtype=dtype) * 4
    scores = normal(6, 16, 16, seed=7, dtype=dtype)
    wide, grad_loss = normal(TOKENS, HIDDEN, seed=8), normal(TOKENS, seed=9)
    targets = torch.arange(TOKENS) * 7 % (PARTS * WIDTH)
    ids = targets % 40
    mean, rstd = canonical.layer_norm(x, weight, bias, 1e-5)[1:]
    probs = canonical.causal_softmax(scores, 2.0)
    visible = torch.arange(6) * 3 + 1
    padded = canonical.padded_softmax(scores, visible, 2.0)
    largest = canonical.vocabulary_max(logits)
    sums = canonical.cross_entropy_sums(logits, targets, largest)
    mine, first, size = logits[2:5].contiguous(), 2 * WIDTH, PARTS * WIDTH
    dense = by_part.flatten(0, 1)[:, None].view(PARTS, WIDTH, HIDDEN)
    part_bias = bias[:WIDTH].expand(PARTS, WIDTH).contiguous()
    return {
        "gemm": lambda k: (
            k.gemm(x, by_part, transpose_b=True, bias=part_bias, out_dtype=dtype),
            k.gemm(x, by_part, transpose_b=True, out_dtype=dtype),
            k.gemm(logits, by_part, alpha=0.25),
            k.gemm(logits, x, transpose_a=True),
        ),
        "tree_sum": lambda k: (
            k.tree_sum(by_part, 0, bias=bias, out_dtype=dtype),
            k.tree_sum(by_part, 1),
        ),
        "row_sum": lambda k: k.row_sum(x),
        "token_block_sum": lambda k: k.token_block_sum(x, 4),
        "sum_of_squares": lambda k: k.sum_of_squares(wide),
        "count_zeros": lambda k: torch.tensor(k.count_zeros(wide.relu())),
        "erf": lambda k: k.erf(wide),
        "exp": lambda k: k.exp(wide),
        "log": lambda k: k.log(wide.abs()),
        "sqrt": lambda k: k.sqrt(wide.abs()),
        "tanh": lambda k: k.tanh(wide),
        "layer_norm": lambda k: k.layer_norm(x, weight, bias, 1e-5),
        "layer_norm_backward": lambda k: k.layer_norm_backward(dy, x, mean, rstd, weight, 4),
        "gelu": lambda k: k.gelu(x),
        "gelu_backward": lambda k: k.gelu_backward(dy, x),
        "gelu_erf": lambda k: k.gelu_erf(x),
        "gelu_erf_backward": lambda k: k.gelu_erf_backward(dy, x),
        "padded_softmax": lambda k: k.padded_softmax(scores, visible, 2.0),
        "padded_softmax_backward": lambda k: k.padded_softmax_backward(
            scores, padded, visible, 2.0
        ),
        "softmax": lambda k: k.softmax(scores, 2.0),
        "softmax_backward": lambda k: k.softmax_backward(scores, probs, 2.0),
        "causal_softmax": lambda k: k.causal_softmax(scores, 2.0),
        "causal_softmax_backward": lambda k: k.causal_softmax_backward(scores, probs, 2.0),
        "embedding": lambda k: k.embedding(ids, dense),
        "embedding_backward": lambda k: k.embedding_backward(dy, ids, (PARTS, WIDTH, HIDDEN)),
        "cross_entropy": lambda k: k.cross_entropy(logits, targets),
        "vocabulary_max": lambda k: k.vocabulary_max(logits),
        "cross_entropy_sums": lambda k: k.cross_entropy_sums(mine, targets, largest, first, size),
        "cross_entropy_loss": lambda k: k.cross_entropy_loss(largest, *sums),
        "cross_entropy_backward": lambda k: k.cross_entropy_backward(
            mine, targets, largest, sums[0], grad_loss, first, size
        ),
        "random_normal": lambda k: k.random_normal((4, 5), 7, 3),
        "dropout": lambda k: k.dropout(x, 0.1, 7, torch.arange(TOKENS)),
        "dropout_add": lambda k: k.dropout_add(x, dy, 0.1, 7, torch.arange(TOKENS)),
        "adam_step": lambda k: stepped(k, wide),
    }


def stepped(module: Any, grad: Tensor) -> list[Tensor]:
    """Parameter and moments after a step."""
    state = [normal(TOKENS, HIDDEN, seed=i) for i in (10, 11)] + [grad.square() + 0.1]
    param, exp_avg, exp_avg_sq = state
    rates = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    module.adam_step(
        *(param, grad, exp_avg, exp_avg_sq),
        **rates,
        bias_correction1=0.19,
        bias_correction2_sqrt=0.14,
    )
    return state


def training_files() -> list[Path]:
    root = Path(__file__).parent.parent / "scenarios"
    return [f for folder in ("engines", "models", "parallel") for f in (root / folder).glob("*.py")]


def test_all_kernels_that_training_uses_are_there() -> None:
    used = {name for f in training_files() for name in re.findall(r"kernels\.(\w+)", f.read_text())}
    assert len(used) > 20
    assert used <= set(native.__all__)


@pytest.mark.parametrize("name", native.__all__)
def test_same_functions_with_the_same_signatures(name: str) -> None:
    assert inspect.signature(getattr(native, name)) == inspect.signature(getattr(canonical, name))


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("name", native.__all__)
def test_results_agree_to_rounding(name: str, dtype: torch.dtype) -> None:
    """Same shapes and dtypes; apart by what fp32 sums and one rounding may do."""
    call = calls(dtype)[name]
    expected, actual = call(canonical), call(native)
    if isinstance(expected, Tensor):
        expected, actual = [expected], [actual]
    for want, got in zip(expected, actual, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        once = 2 * UNIT_ROUNDOFF[want.dtype] if want.is_floating_point() else 0.0
        largest = want.abs().max().item() if want.is_floating_point() else 0.0
        # Terms of sums are at most some times as large as the largest result.
        inner = 64 * 2.0**-24 * max(largest, 1.0)
        torch.testing.assert_close(got, want, rtol=once, atol=inner)


def test_the_agreement_test_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "exp", lambda x: x.exp() * (1 + 1e-4))
    with pytest.raises(AssertionError):
        test_results_agree_to_rounding("exp", torch.float32)


def test_kernels_follow_the_arithmetic_in_use() -> None:
    assert kernels.gemm is canonical.gemm
    with arithmetic.use("native"):
        assert kernels.gemm is native.gemm
        with arithmetic.use("canonical"):
            assert kernels.gemm is canonical.gemm
        assert kernels.gemm is native.gemm
    assert kernels.gemm is canonical.gemm
    with (
        pytest.raises(ValueError, match="got 'exact', expected one of canonical, native"),
        arithmetic.use("exact"),
    ):
        pass


def test_native_runs_none_of_the_canonical_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for what is keyed by position or counted."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a canonical kernel ran in native arithmetic")

    shared = {"count_zeros", "dropout", "dropout_add", "random_normal"}
    natives = {name: call for name, call in calls(torch.float16).items() if name not in shared}
    for name in dir(canonical._C):
        if name.startswith("canonical_"):
            monkeypatch.setattr(canonical._C, name, refuse)
    for call in natives.values():
        call(native)
    with pytest.raises(AssertionError, match="a canonical kernel ran"):
        canonical.exp(torch.ones(1))


def test_training_code_takes_its_kernels_from_the_arithmetic_in_use() -> None:
    """A layer that imports canonical kernels would train canonically in native arithmetic, too."""
    files = training_files()
    assert len(files) > 20
    wrong = [f.name for f in files if re.search(r"import canonical\b|_C\b", f.read_text())]
    assert wrong == []
