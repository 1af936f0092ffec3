"""Every canonical kernel against its slow definition, bit for bit."""

from fractions import Fraction

import canonical_definition as slow
import numpy as np
import pytest
import torch
from canonical_definition import assert_detected, assert_same_bits, rounded, widened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from primitives import _C, canonical

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)

SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-40, 6e-8]
SPECIAL += [65504.0, 65520.0, 3.4e38, -3.4e38, 1.17549435e-38]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, family: str = "normal") -> Tensor:
    """Numbers of one family: normal, wide (all exponents) or special (inf, nan, subnormals, -0)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if family == "wide":
        x = x * torch.exp2(torch.randint(-60, 60, shape, generator=generator).float())
    if family == "special":
        pick = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.1, pick, x)
    return x.to(dtype)


families = st.sampled_from(["normal", "wide", "special"])


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
def test_gemm_over_several_blocks_of_every_dimension(transpose_a: bool, transpose_b: bool) -> None:
    a, b = draw((150, 530), torch.float32, 1), draw((530, 500), torch.float32, 2)
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


@pytest.mark.parametrize("name", ["exp", "log", "tanh_", "sqrt"])
def test_elementwise(name: str) -> None:
    definition = {"exp": slow.exp, "log": slow.log, "tanh_": slow.tanh, "sqrt": np.sqrt}[name]
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


@few
@given(st.integers(1, 3), st.integers(1, 40), dtypes, seeds, families)
def test_causal_softmax(num, length, dtype, seed, family):
    scores = draw((num, length, length), dtype, seed, family)
    probs = canonical.causal_softmax(scores, 0.25)
    assert_same_bits(probs, rounded(slow.causal_softmax(widened(scores), 0.25), dtype), "softmax")
    dprobs = draw((num, length, length), dtype, seed + 1, family)
    got = canonical.causal_softmax_backward(dprobs, probs, 0.25)
    expected = slow.causal_softmax_backward(widened(dprobs), widened(probs), 0.25)
    assert_same_bits(got, rounded(expected, dtype), "softmax backward")


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
@given(st.integers(1, 30), st.integers(1, 40), dtypes, seeds, families)
def test_embedding(tokens, hidden, dtype, seed, family):
    weight = draw((2, 5, hidden), dtype, seed)
    ids = torch.randint(0, 10, (tokens,))
    assert_same_bits(canonical.embedding(ids, weight), weight.view(10, hidden)[ids])
    dy = draw((tokens, hidden), dtype, seed + 1, family)
    table = np.zeros((10, hidden), np.float32)
    for token, row in zip(ids.tolist(), widened(dy), strict=True):
        table[token] = table[token] + row
    got = canonical.embedding_backward(dy, ids, (2, 5, hidden))
    assert_same_bits(got.view(10, hidden), rounded(table, torch.float32), "embedding_backward")


def test_philox_known_answers() -> None:
    """The vectors of Random123's kat_vectors that the kernels' counters can reach."""
    zero = _C.canonical_random_words(4, 0, 0)
    assert [w & 0xFFFFFFFF for w in zero.tolist()] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]
    ones = slow.philox(2**64 - 1, (0xFFFFFFFF,) * 4)
    assert ones == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = slow.philox(0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
    assert pi == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@few
@given(st.integers(1, 100), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_random_words(n: int, key: int, high: int) -> None:
    got = [w & 0xFFFFFFFF for w in _C.canonical_random_words(n, key, high).tolist()]
    counters = [(j, 0, high & 0xFFFFFFFF, high >> 32) for j in range((n + 3) // 4)]
    assert got == [word for c in counters for word in slow.philox(key, c)][:n]


@few
@given(st.integers(1, 40), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_random_normal(n: int, key: int, first: int) -> None:
    for start in (first, 2**32 - n // 2):  # the low word of the counter wraps inside a vector
        expected = rounded(slow.random_normal(n, key, start), torch.float32)
        assert_same_bits(canonical.random_normal((n,), key, start), expected, "random_normal")


@few
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.1, 0.5, 0.999]),
    st.integers(0, 2**64 - 1),
    dtypes,
    seeds,
    families,
)
def test_dropout(rows, width, probability, key, dtype, seed, family):
    x, residual = (draw((rows, width), dtype, seed + i, family) for i in range(2))
    row_ids = torch.randint(-(2**63), 2**63 - 1, (rows,))
    arguments = (probability, key, row_ids.tolist())
    assert_same_bits(
        canonical.dropout(x, probability, key, row_ids),
        rounded(slow.dropout(widened(x), None, *arguments), dtype),
        "dropout",
    )
    assert_same_bits(
        canonical.dropout_add(x, residual, probability, key, row_ids),
        rounded(slow.dropout(widened(x), widened(residual), *arguments), dtype),
        "dropout_add",
    )
    if probability == 0.5 and rows * width > 60:
        other = (probability, key, (row_ids + 1).tolist())
        ones = torch.ones(rows, width)
        assert_detected(
            lambda: slow.dropout(ones.numpy(), None, *other),
            canonical.dropout(ones, probability, key, row_ids),
        )


def test_dropout_does_not_depend_on_how_rows_are_split() -> None:
    x, row_ids = draw((32, 17), torch.float32, 7), torch.arange(32)
    whole = canonical.dropout(x, 0.3, 11, row_ids)
    parts = [canonical.dropout(a.contiguous(), 0.3, 11, r) for a, r in
             zip(x.chunk(4), row_ids.chunk(4), strict=True)]  # fmt: skip
    assert_same_bits(torch.cat(parts), whole)
    assert 0.15 < float((whole == 0).float().mean()) < 0.45


@few
@given(st.integers(1, 100), seeds, families)
def test_adam_step(n, seed, family):
    p, g, m, v = (draw((n,), torch.float32, seed + i, family) for i in range(4))
    v = v.abs()
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    hyper |= {"bias_correction1": 1 - 0.9**3, "bias_correction2_sqrt": (1 - 0.999**3) ** 0.5}
    expected = slow.adam_step(*(t.numpy().copy() for t in (p, g, m, v)), hyper)
    canonical.adam_step(p, g, m, v, **hyper)
    for got, e in zip((p, m, v), expected, strict=True):
        assert_same_bits(got, rounded(e, torch.float32), "adam_step")


@few
@given(st.integers(0, 200), dtypes, seeds)
def test_count_zeros(n, dtype, seed):
    x = draw((n,), dtype, seed, "special")
    assert canonical.count_zeros(x) == int((x == 0).sum())


def test_flush_to_zero_of_the_caller_changes_nothing() -> None:
    x = torch.full((40,), 1e-41)
    plain = canonical.gelu(x)
    assert torch.set_flush_denormal(True)
    try:
        flushed = canonical.gelu(x)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(flushed, plain)
    assert (plain != 0).all()
