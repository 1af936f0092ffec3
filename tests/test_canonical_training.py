"""Embedding, random numbers, dropout and the optimizer step against their slow definitions."""

import canonical_definition as slow
import numpy as np
import pytest
import torch
from canonical_definition import assert_detected, assert_same_bits, rounded, widened
from canonical_inputs import draw, dtypes, families, few, seeds
from hypothesis import given
from hypothesis import strategies as st

from primitives import _C, canonical


@pytest.fixture(autouse=True)
def _quiet_numpy():
    with np.errstate(all="ignore"):
        yield


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
