"""RMSNorm, SiLU, SwiGLU and softmax against their slow definitions; edge values; empty tensors."""

import canonical_definition as slow
import numpy as np
import pytest
import torch
from canonical_definition import assert_detected, assert_same_bits, rounded, widened
from canonical_inputs import DTYPES, draw, dtypes, families, few, seeds
from hypothesis import given
from hypothesis import strategies as st

from primitives import canonical


@pytest.fixture(autouse=True)
def _quiet_numpy():
    with np.errstate(all="ignore"):
        yield


@few
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 70), dtypes, seeds, families)
def test_rms_norm(num_blocks, block, hidden, dtype, seed, family):
    x = draw((num_blocks * block, hidden), dtype, seed, family)
    dy, w = draw(tuple(x.shape), dtype, seed + 1), draw((hidden,), dtype, seed + 2)
    got = canonical.rms_norm(x, w, 1e-5)
    expected = slow.rms_norm(widened(x), widened(w), 1e-5)
    for g, e, kind in zip(got, expected, (dtype, torch.float32), strict=True):
        assert_same_bits(g, rounded(e, kind), "rms_norm")
    _, rstd = got
    backward = canonical.rms_norm_backward(dy, x, rstd, w, num_blocks)
    arguments = [widened(t) for t in (dy, x, rstd, w)]
    expected = slow.rms_norm_backward(*arguments, num_blocks=num_blocks)
    for g, e, kind in zip(backward, expected, (dtype, torch.float32), strict=True):
        assert_same_bits(g, rounded(e, kind), "rms_norm_backward")
    if hidden > 20 and family == "normal" and dtype == torch.float32:
        zeros = np.zeros(hidden, np.float32)
        assert_detected(lambda: slow.layer_norm(widened(x), widened(w), zeros, 1e-5)[0], got[0])


@few
@given(st.integers(1, 100), dtypes, seeds, families, st.sampled_from([3, 60]))
def test_silu_and_swiglu(n, dtype, seed, family, spread):
    x = draw((n,), dtype, seed, family) * spread
    dy, value = (draw((n,), dtype, seed + i, family) for i in (1, 2))
    wide_x, wide_dy, wide_value = (widened(t) for t in (x, dy, value))
    silu, slope = slow.silu(wide_x), slow.silu_derivative(wide_x)
    got = canonical.silu(x)
    assert_same_bits(got, rounded(silu, dtype), "silu")
    assert_same_bits(canonical.silu_backward(dy, x), rounded(wide_dy * slope, dtype), "backward")
    assert_same_bits(canonical.swiglu(x, value), rounded(silu * wide_value, dtype), "swiglu")
    dgate, dvalue = canonical.swiglu_backward(dy, x, value)
    assert_same_bits(dgate, rounded((wide_dy * wide_value) * slope, dtype), "dgate")
    assert_same_bits(dvalue, rounded(wide_dy * silu, dtype), "dvalue")
    if n > 60 and family == "normal" and dtype == torch.float32:
        naive = np.float32(1) / (slow.exp(-wide_x) + np.float32(1))
        assert_detected(lambda: wide_x * naive, got)


def test_values_of_sigmoid_rsqrt_and_silu_at_the_edges() -> None:
    inf, nan, tiny = float("inf"), float("nan"), 1e-45
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, -200.0, 200.0, tiny])
    assert_same_bits(canonical.sigmoid(x), torch.tensor([0.5, 0.5, 1, 0, nan, 0, 1, 0.5]))
    subnormal = canonical.sigmoid(torch.tensor([-90.0, -100.0]))
    assert ((subnormal > 0) & (subnormal < 1.17549435e-38)).all()
    roots = canonical.rsqrt(torch.tensor([0.0, -0.0, inf, -1.0, nan, 4.0, -tiny]))
    assert_same_bits(roots, torch.tensor([inf, -inf, 0, nan, nan, 0.5, nan]))
    silu = canonical.silu(x)  # as x / (1 + exp(-x)): not a number at -inf
    assert_same_bits(silu, torch.tensor([0, -0.0, inf, nan, nan, -0.0, 200, 0]))
    ones = torch.ones_like(x)
    slopes = canonical.silu_backward(ones, x)
    assert_same_bits(slopes, torch.tensor([0.5, 0.5, 1, 0, nan, 0, 1, 0.5]))


@few
@given(st.sampled_from([(), (3,), (2, 2)]), st.integers(1, 70), dtypes, seeds, families)
def test_softmax(outer, length, dtype, seed, family):
    scores = draw((*outer, length), dtype, seed, family)
    seen = np.ones(length, bool)
    probs = canonical.softmax(scores, 0.25)
    expected = slow.masked_softmax(widened(scores), seen, 0.25)
    assert_same_bits(probs, rounded(expected, dtype), "softmax")
    dprobs = draw((*outer, length), dtype, seed + 1, family)
    got = canonical.softmax_backward(dprobs, probs, 0.25)
    expected = slow.masked_softmax_backward(widened(dprobs), widened(probs), seen, 0.25)
    assert_same_bits(got, rounded(expected, dtype), "softmax backward")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_in_gives_nothing_or_zeros_out(dtype: torch.dtype) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    row, no_rstd = torch.ones(5, dtype=dtype), torch.empty(0)
    no_ids = torch.empty(0, dtype=torch.int64)
    for name in ("exp", "log", "tanh", "erf", "sqrt", "sigmoid", "rsqrt"):
        assert getattr(canonical, name)(torch.empty(0, 3)).shape == (0, 3)
    for name in ("gelu", "gelu_erf", "silu"):
        assert getattr(canonical, name)(empty(0, 5)).shape == (0, 5)
        assert getattr(canonical, f"{name}_backward")(empty(0, 5), empty(0, 5)).shape == (0, 5)
    assert canonical.swiglu(empty(0), empty(0)).shape == (0,)
    assert [t.shape for t in canonical.swiglu_backward(*[empty(0)] * 3)] == [(0,), (0,)]
    for shape in ((0, 5), (3, 0), (0,)):
        probs = canonical.softmax(empty(*shape))
        assert canonical.softmax_backward(empty(*shape), probs).shape == probs.shape == shape
    for shape in ((0, 4, 4), (2, 0, 0)):
        probs = canonical.causal_softmax(empty(*shape), 1.0)
        assert canonical.causal_softmax_backward(empty(*shape), probs, 1.0).shape == shape
    no_tokens = empty(0, 5)
    y, mean, rstd = canonical.layer_norm(no_tokens, row, row, 1e-5)
    assert (y.shape, mean.shape, rstd.shape) == ((0, 5), (0,), (0,))
    zeros = torch.zeros(2, 5)
    layer = canonical.layer_norm_backward(no_tokens, no_tokens, mean, rstd, row, 2)
    rms = canonical.rms_norm_backward(no_tokens, no_tokens, no_rstd, row, 2)
    for gradient in (*layer[1:], *rms[1:], canonical.token_block_sum(no_tokens, 2)):
        assert_same_bits(gradient, zeros)
    assert [t.shape for t in canonical.rms_norm(no_tokens, row, 1e-5)] == [(0, 5), (0,)]
    assert_same_bits(canonical.gemm(empty(2, 0), empty(0, 5)), zeros)
    assert canonical.gemm(empty(0, 3), empty(3, 5)).shape == (0, 5)
    assert canonical.gemm(empty(0, 2, 3), empty(3, 5)).shape == (0, 2, 5)
    assert_same_bits(canonical.tree_sum(no_tokens), torch.zeros(5))
    assert canonical.row_sum(no_tokens).shape == (0,)
    assert_same_bits(
        canonical.embedding_backward(no_tokens, no_ids, (1, 2, 5)), torch.zeros(1, 2, 5)
    )
    loss, largest, total = canonical.cross_entropy(empty(2, 0, 5), no_ids)
    assert loss.shape == largest.shape == total.shape == (0,)
