"""Matrix product, sums, elementwise functions and layers against their slow definitions."""

from fractions import Fraction

import canonical_definition as slow
import numpy as np
import pytest
import torch
from canonical_definition import assert_detected, assert_same_bits, rounded, widened
from canonical_inputs import SPECIAL, draw, dtypes, families, few, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from primitives import canonical


@pytest.fixture(autouse=True)
def _quiet_numpy():
    with np.errstate(all="ignore"):
        yield


@few
@given(seeds, families)
def test_the_slow_fma_is_exact(seed: int, family: str) -> None:
    a, b, c = (widened(draw((64,), torch.float32, seed + i, family)) for i in range(3))
    c = np.where(np.arange(64) % 2 == 0, -(a * b), c).astype(np.float32)  # cancellation
    got = slow.fma(a, b, c)
    for i in range(64):
        if not (np.isfinite(a[i]) and np.isfinite(b[i]) and np.isfinite(c[i])):
            continue
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if not np.isfinite(got[i]):
            assert abs(exact) >= Fraction(2**128) - Fraction(2**103)
            continue
        error = abs(Fraction(float(got[i])) - exact)
        for neighbour in (np.nextafter(got[i], np.float32(s)) for s in (np.inf, -np.inf)):
            if np.isfinite(neighbour):
                assert error <= abs(Fraction(float(neighbour)) - exact)


@few
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(0, 40), st.integers(1, 70)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([1.0, 0.125, 1 / 3]),
    st.tuples(dtypes, dtypes, dtypes),
    seeds,
    families,
)
def test_gemm(sizes, transpose_a, transpose_b, batched, bias_dims, alpha, types, seed, family):
    num_batches, m, k, n = sizes
    a = draw((num_batches, m, k), types[0], seed, family)
    b = draw((num_batches, k, n), types[1], seed + 1, family)
    a, b = (x if keep else x[0] for x, keep in zip((a, b), batched, strict=True))
    num_batches = num_batches if any(batched) else 1
    bias = {None: None, 1: (n,), 2: (num_batches, n)}[bias_dims]
    bias = None if bias is None else draw(bias, types[0], seed + 2, family)
    expected = slow.gemm(
        widened(a), widened(b), alpha, None if bias is None else widened(bias)
    ).reshape((num_batches, m, n) if any(batched) else (m, n))
    got = canonical.gemm(
        a.mT.contiguous() if transpose_a else a,
        b.mT.contiguous() if transpose_b else b,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        bias=bias,
        alpha=alpha,
        out_dtype=types[2],
    )
    assert_same_bits(got, rounded(expected, types[2]), "gemm")


@pytest.mark.parametrize(("transpose_a", "transpose_b"), [(False, True), (True, False)])
@pytest.mark.parametrize(
    ("dtype", "m", "k", "n"),
    [(torch.float32, 150, 530, 500)]
    + [(torch.bfloat16, 200, k, 330) for k in (1, 511, 512, 513, 1300)],
)
def test_gemm_over_several_blocks(
    dtype: torch.dtype, m: int, k: int, n: int, transpose_a: bool, transpose_b: bool
) -> None:
    a, b = draw((m, k), dtype, 1), draw((k, n), dtype, 2)
    a[5], b[:, 7], a[9, 0] = float("inf"), 3e38, float("nan")
    got = canonical.gemm(
        a.T.contiguous() if transpose_a else a,
        b.T.contiguous() if transpose_b else b,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
    )
    assert_same_bits(got, rounded(slow.gemm(widened(a), widened(b), 1.0, None), torch.float32))


def test_gemm_takes_strided_operands() -> None:
    packed = draw((3, 10, 48), torch.float32, 3)  # q and k side by side in each row
    q, k = packed[..., :16], packed[..., 16:32]
    expected = slow.gemm(widened(q), widened(k.mT), 1.0, None)
    assert_same_bits(canonical.gemm(q, k, transpose_b=True), rounded(expected, torch.float32))


# Exponents around those at which two steps of a chain may go in one instruction: the smallest of a
# and that of b must sum up to -112 at least.
@few
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 30), st.integers(1, 90), st.integers(1, 70)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(-56, -56), (-57, -56), (-56, -57), (-126, 14), (-126, 13), (14, -126)]),
    st.sampled_from([4, 80]),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16]),
    seeds,
)
def test_gemm_of_bfloat16_with_small_numbers(
    sizes, transpose_a, transpose_b, smallest, spread, density, out_dtype, seed
) -> None:
    num_batches, m, k, n = sizes
    generator = torch.Generator().manual_seed(seed)

    def powers(shape: tuple[int, ...], exponent: int) -> Tensor:
        mantissas = 1 + torch.randint(128, shape, generator=generator) / 128
        exponents = exponent + torch.randint(spread, shape, generator=generator)
        signs = torch.randint(2, shape, generator=generator) * 2 - 1
        keep = torch.rand(shape, generator=generator) <= density
        x = torch.where(keep, torch.ldexp(signs * mantissas, exponents), 0.0 * signs)
        return x.to(torch.bfloat16)

    a, b = powers((num_batches, m, k), smallest[0]), powers((num_batches, k, n), smallest[1])
    if k > 1:  # every second step cancels the one before
        a[:, :, 1::2] = -a[:, :, : k // 2 * 2 : 2]
        b[:, 1::2] = b[:, : k // 2 * 2 : 2]
    got = canonical.gemm(
        a.mT.contiguous() if transpose_a else a,
        b.mT.contiguous() if transpose_b else b,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        out_dtype=out_dtype,
    )
    assert_same_bits(got, rounded(slow.gemm(widened(a), widened(b), 1.0, None), out_dtype))


def test_gemm_of_bfloat16_keeps_the_order_of_k() -> None:
    a, b = draw((40, 64), torch.bfloat16, 6), draw((64, 40), torch.bfloat16, 7)
    got = canonical.gemm(a, b)
    swapped = torch.arange(64) ^ 1  # the two steps of a pair
    x, y = widened(a), widened(b)
    assert_detected(lambda: slow.gemm(x[:, swapped], y[swapped], 1.0, None), got)
    assert_same_bits(got, rounded(slow.gemm(x, y, 1.0, None), torch.float32))


def test_gemm_of_bfloat16_keeps_what_flushing_to_zero_would_lose() -> None:
    tiny = torch.full((16, 1), 2.0**-64, dtype=torch.bfloat16)
    assert canonical.gemm(tiny, tiny.T).eq(2.0**-128).all()  # a product
    subnormal = torch.full((16, 1), 2.0**-130, dtype=torch.bfloat16)
    assert canonical.gemm(subnormal, torch.ones(1, 16).bfloat16()).eq(2.0**-130).all()
    assert canonical.gemm(subnormal, 2.0**100 * torch.ones(1, 16).bfloat16()).eq(2.0**-30).all()
    # A difference of normal products: 2^-125 - 2^-126 * 1.9921875.
    a = torch.tensor([[2.0**-60, -(2.0**-63) * 1.9921875]], dtype=torch.bfloat16).expand(16, 2)
    b = torch.tensor([2.0**-65, 2.0**-63], dtype=torch.bfloat16)[:, None].expand(2, 16)
    assert canonical.gemm(a, b.contiguous()).eq(2.0**-133).all()
    # A product that rounds to -0 stays -0 through a pair that is not whole.
    negative = torch.full((16, 1), -(2.0**-100), dtype=torch.bfloat16)
    assert canonical.gemm(negative, -negative.T).signbit().all()


def test_gemm_tells_a_fused_chain_from_an_unfused_one() -> None:
    a, b = draw((8, 40), torch.float32, 4), draw((40, 8), torch.float32, 5)

    def unfused() -> slow.Floats:
        c = np.zeros((8, 8), np.float32)
        for k in range(40):
            c = c + widened(a)[:, k : k + 1] * widened(b)[k : k + 1]
        return c

    got = canonical.gemm(a, b)
    assert_detected(unfused, got)
    assert_detected(lambda: slow.gemm(widened(a.flip(1)), widened(b.flip(0)), 1.0, None), got)


@few
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(0, 2),
    st.booleans(),
    dtypes,
    dtypes,
    seeds,
    families,
)
def test_tree_sum(shape, dim, with_bias, dtype, out_dtype, seed, family):
    dim = dim % len(shape)
    x = draw(tuple(shape), dtype, seed, family)
    expected = slow.tree(widened(x), dim)
    bias = None
    if with_bias and dim + 1 < len(shape):
        bias = draw((shape[-1],), dtype, seed + 1, family)
        expected = expected + widened(bias)
    got = canonical.tree_sum(x, dim, bias=bias, out_dtype=out_dtype)
    assert_same_bits(got, rounded(expected, out_dtype), "tree_sum")


@few
@given(st.integers(0, 300), st.integers(1, 3), dtypes, seeds, families)
def test_row_sum_and_sum_of_squares(n, rows, dtype, seed, family):
    x = draw((rows, n), dtype, seed, family)
    assert_same_bits(canonical.row_sum(x), rounded(slow.tree(widened(x)), torch.float32))
    squares = slow.tree(widened(x) * widened(x))
    assert_same_bits(canonical.sum_of_squares(x.float()), rounded(squares, torch.float32))


@few
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 40), dtypes, seeds)
def test_token_block_sum(block, num_blocks, n, dtype, seed):
    dy = draw((block * num_blocks, n), dtype, seed)
    expected = slow.tree(widened(dy).reshape(num_blocks, block, n), 1)
    assert_same_bits(canonical.token_block_sum(dy, num_blocks), rounded(expected, torch.float32))


@given(st.sampled_from([3, 5, 6, 7, 11, 33]), seeds)
@few
def test_the_tree_is_told_from_other_orders(n: int, seed: int) -> None:
    x = draw((16 * n, 64), torch.float32, seed)
    got = canonical.tree_sum(x)

    def in_order() -> slow.Floats:
        total = np.zeros(64, np.float32)
        for row in widened(x):
            total = total + row
        return total

    def folded() -> slow.Floats:
        half = 8 * n
        return slow.tree(widened(x)[:half] + widened(x)[half:], 0)

    assert_detected(in_order, got)
    assert_detected(folded, got)


def test_subtrees_of_ranks_make_the_whole_tree() -> None:
    x = draw((64, 33), torch.bfloat16, 6)
    for num_ranks in (2, 4, 8):
        parts = torch.stack([canonical.tree_sum(part) for part in x.chunk(num_ranks)])
        assert_same_bits(canonical.tree_sum(parts), canonical.tree_sum(x), f"{num_ranks} ranks")


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "erf", "sqrt", "sigmoid", "rsqrt"])
def test_elementwise(name: str) -> None:
    definition = np.sqrt if name == "sqrt" else getattr(slow, name)
    steps = torch.arange(-(2**31), 2**31, 70001, dtype=torch.int64).to(torch.int32)
    x = torch.cat([steps.view(torch.float32), torch.linspace(-110, 95, 4001)])
    x = torch.cat([x, torch.tensor(SPECIAL), torch.randn(1000)])
    got = getattr(canonical, name)(x)
    assert_same_bits(got, rounded(definition(widened(x)), torch.float32), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_stores(dtype: torch.dtype) -> None:
    steps = torch.arange(-(2**31), 2**31, 40009, dtype=torch.int64).to(torch.int32)
    everywhere = steps.view(torch.float32)
    exact = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.cat([everywhere, exact.float(), torch.tensor(SPECIAL)])
    halfway = (x.view(torch.int32) & ~0x1FFF | 0x1000).view(torch.float32)  # ties of float16
    x = torch.cat([x, halfway, (x.view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)])
    x = x[~x.isnan()]
    assert_same_bits(canonical.tree_sum(x[None], out_dtype=dtype), x.to(dtype), "store")
    assert_same_bits(
        canonical.tree_sum(exact[None]), rounded(exact.float().numpy(), torch.float32), "load"
    )


@few
@given(st.integers(1, 9), st.integers(1, 70), dtypes, seeds, families)
def test_layer_norm(tokens, hidden, dtype, seed, family):
    x = draw((tokens, hidden), dtype, seed, family)
    w, b = draw((hidden,), dtype, seed + 1), draw((hidden,), dtype, seed + 2)
    got = canonical.layer_norm(x, w, b, 1e-5)
    expected = slow.layer_norm(widened(x), widened(w), widened(b), 1e-5)
    for g, e, kind in zip(got, expected, (dtype, torch.float32, torch.float32), strict=True):
        assert_same_bits(g, rounded(e, kind), "layer_norm")


@few
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 70), dtypes, seeds, families)
def test_layer_norm_backward(num_blocks, block, hidden, dtype, seed, family):
    x = draw((num_blocks * block, hidden), dtype, seed, family)
    dy, w = draw(tuple(x.shape), dtype, seed + 1), draw((hidden,), dtype, seed + 2)
    _, mean, rstd = canonical.layer_norm(x, w, w, 1e-5)
    got = canonical.layer_norm_backward(dy, x, mean, rstd, w, num_blocks)
    expected = slow.layer_norm_backward(
        *(widened(t) for t in (dy, x, mean, rstd, w)), num_blocks=num_blocks
    )
    for g, e, kind in zip(got, expected, (dtype, torch.float32, torch.float32), strict=True):
        assert_same_bits(g, rounded(e, kind), "layer_norm_backward")


@few
@given(st.integers(1, 100), dtypes, seeds, families)
def test_gelu(n, dtype, seed, family):
    x, dy = draw((n,), dtype, seed, family) * 3, draw((n,), dtype, seed + 1)
    assert_same_bits(canonical.gelu(x), rounded(slow.gelu(widened(x)), dtype), "gelu")
    expected = slow.gelu_backward(widened(dy), widened(x))
    assert_same_bits(canonical.gelu_backward(dy, x), rounded(expected, dtype), "gelu_backward")
    got = canonical.gelu_erf(x)
    assert_same_bits(got, rounded(slow.gelu_erf(widened(x)), dtype), "gelu_erf")
    if n > 60 and family == "normal" and dtype == torch.float32:
        assert_detected(lambda: slow.gelu(widened(x)), got)  # the other GELU
    got = canonical.gelu_erf_backward(dy, x)
    expected = slow.gelu_erf_backward(widened(dy), widened(x))
    assert_same_bits(got, rounded(expected, dtype), "gelu_erf_backward")


@few
@given(st.integers(1, 3), st.integers(1, 40), dtypes, seeds, families)
def test_causal_softmax(num, length, dtype, seed, family):
    scores = draw((num, length, length), dtype, seed, family)
    probs = canonical.causal_softmax(scores, 0.25)
    expected = slow.masked_softmax(widened(scores), slow.causal(length), 0.25)
    assert_same_bits(probs, rounded(expected, dtype), "softmax")
    dprobs = draw((num, length, length), dtype, seed + 1, family)
    got = canonical.causal_softmax_backward(dprobs, probs, 0.25)
    expected = slow.masked_softmax_backward(
        widened(dprobs), widened(probs), slow.causal(length), 0.25
    )
    assert_same_bits(got, rounded(expected, dtype), "softmax backward")


@few
@given(st.integers(1, 3), st.integers(1, 40), dtypes, seeds, families)
def test_padded_softmax(num, length, dtype, seed, family):
    scores = draw((num, length, length), dtype, seed, family)
    generator = torch.Generator().manual_seed(seed)
    visible = torch.randint(1, length + 1, (num,), generator=generator)
    mask = slow.unpadded(visible.numpy(), length)
    probs = canonical.padded_softmax(scores, visible, 0.25)
    expected = slow.masked_softmax(widened(scores), mask, 0.25)
    assert_same_bits(probs, rounded(expected, dtype), "padded softmax")
    dprobs = draw((num, length, length), dtype, seed + 1, family)
    got = canonical.padded_softmax_backward(dprobs, probs, visible, 0.25)
    expected = slow.masked_softmax_backward(widened(dprobs), widened(probs), mask, 0.25)
    assert_same_bits(got, rounded(expected, dtype), "padded softmax backward")
    if length > 4 and family == "normal":
        whole = np.ones_like(mask)
        everything_seen = torch.full((num,), length)
        assert_same_bits(
            canonical.padded_softmax(scores, everything_seen, 0.25),
            rounded(slow.masked_softmax(widened(scores), whole, 0.25), dtype),
        )
        if int(visible.min()) < length:
            assert_detected(lambda: slow.masked_softmax(widened(scores), whole, 0.25), probs)


@few
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 70), dtypes, seeds, families)
def test_cross_entropy(parts, tokens, width, dtype, seed, family):
    logits = draw((parts, tokens, width), dtype, seed, family)
    targets = torch.randint(0, parts * width, (tokens,))
    got = canonical.cross_entropy(logits, targets)
    expected = slow.cross_entropy(widened(logits), targets.numpy())
    for g, e in zip(got, expected, strict=True):
        assert_same_bits(g, rounded(e, torch.float32), "cross_entropy")
    grad = draw((tokens,), torch.float32, seed + 1)
    _, m, total = got
    backward = canonical.cross_entropy_backward(logits, targets, m, total, grad)
    slow_backward = slow.cross_entropy_backward(
        widened(logits), targets.numpy(), m.numpy(), total.numpy(), grad.numpy()
    )
    assert_same_bits(backward, rounded(slow_backward, dtype), "cross_entropy_backward")


@few
@given(
    st.sampled_from([1, 2, 4, 8]), st.integers(1, 6), st.integers(1, 40), dtypes, seeds, families
)
def test_cross_entropy_of_vocabulary_shards(shards, tokens, width, dtype, seed, family):
    """What each holder of some parts contributes is finished by the tree over the holders."""
    logits = draw((8, tokens, width), dtype, seed, family)
    vocab_size = 8 * width
    targets = torch.randint(0, vocab_size, (tokens,))
    grad = draw((tokens,), torch.float32, seed + 1)
    loss, largest, total = canonical.cross_entropy(logits, targets)

    pieces = logits.chunk(shards)
    firsts = [i * vocab_size // shards for i in range(shards)]
    maxima = torch.stack([canonical.vocabulary_max(piece) for piece in pieces])
    maximum = maxima.amax(dim=0)
    assert_same_bits(torch.where(maximum.isnan(), torch.nan, maximum), largest, "max")
    sums = [
        torch.stack(canonical.cross_entropy_sums(piece, targets, largest, first, vocab_size))
        for piece, first in zip(pieces, firsts, strict=True)
    ]
    sum_exp, target_logit = canonical.tree_sum(torch.stack(sums))
    assert_same_bits(sum_exp, total, "sum_exp")
    assert_same_bits(canonical.cross_entropy_loss(largest, sum_exp, target_logit), loss, "loss")
    parts = [
        canonical.cross_entropy_backward(piece, targets, largest, total, grad, first, vocab_size)
        for piece, first in zip(pieces, firsts, strict=True)
    ]
    whole = canonical.cross_entropy_backward(logits, targets, largest, total, grad)
    assert_same_bits(torch.cat(parts), whole, "cross_entropy_backward")
