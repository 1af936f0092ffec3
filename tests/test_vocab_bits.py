"""Entropy and log-probability over a split vocabulary: the bits of the definition, for every tp."""

import numpy as np
import pytest
import torch
import vocab_definition as definition
from canonical_definition import F, assert_same_bits, rounded, widened
from canonical_inputs import dtypes, seeds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vocab_cases import FAMILIES, IGNORED, Outcome, draw, evaluate

families = st.sampled_from(sorted(FAMILIES))
vocab_sizes = st.one_of(
    st.integers(1, 200), st.integers(1, 20_000), st.sampled_from([16384, 50257])
)
scales = st.sampled_from([1.0, 1.0, 0.7, 2.5])


def labels_and_grads(num_tokens: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels with an ignored one at times, gradients [3, tokens] with zeros at times."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab_size, (num_tokens,), generator=g)
    labels[torch.rand(num_tokens, generator=g) < 0.2] = IGNORED
    grads = torch.randn(3, num_tokens, generator=g)
    grads[torch.rand(3, num_tokens, generator=g) < 0.3] = 0.0
    return labels, grads


def defined(logits: Tensor, labels: Tensor, grads: Tensor, scale: float) -> Outcome:
    z = widened(logits)
    with np.errstate(all="ignore"):
        q, *results = definition.results(z, labels.numpy(), IGNORED, F(scale))
        grad = definition.gradient(z, labels.numpy(), IGNORED, grads.numpy(), F(scale))
    tokens = torch.float32
    quads = np.stack([q.max, q.sum, q.weighted], -1)
    quads[np.isnan(q.sum)] = np.nan
    return Outcome(
        *(rounded(x, tokens) for x in results), rounded(quads, tokens), rounded(grad, logits.dtype)
    )


def assert_same(actual: Outcome, expected: Outcome, what: str) -> None:
    for name in ("entropy", "log_prob", "log_sum_exp"):
        assert_same_bits(getattr(actual, name), getattr(expected, name), f"{what}: {name}")
    width = expected.quads.shape[1]  # the definition has no target's logit
    assert_same_bits(actual.quads[:, :width], expected.quads, f"{what}: quads")
    assert actual.grad is not None
    assert expected.grad is not None
    assert_same_bits(actual.grad, expected.grad, f"{what}: grad")


@settings(max_examples=60, deadline=None)
@given(families, vocab_sizes, st.integers(1, 3), dtypes, scales, seeds)
@example("normal 5", 16384, 2, torch.float32, 1.0, 0)  # whole blocks only
@example("normal 5", 40000, 2, torch.bfloat16, 1.0, 1)  # several blocks a segment, a short one last
@example("nan", 3, 2, torch.float32, 1.0, 2)  # most segments are empty
def test_the_bits_of_the_definition_for_every_tp(
    family: str, vocab_size: int, num_tokens: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    logits = draw(family, (num_tokens, vocab_size), dtype, seed)
    labels, grads = labels_and_grads(num_tokens, vocab_size, seed)
    expected = defined(logits, labels, grads, scale)
    for num_ranks in (1, 2, 4, 8, 16):
        actual = evaluate(logits, labels, num_ranks, grads, scale)
        assert_same(actual, expected, f"{family}, tp{num_ranks}")


def test_another_order_of_sums_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = draw("normal 5", (4, 20_000), torch.float32, 0)
    labels, grads = labels_and_grads(4, 20_000, 0)
    actual = evaluate(logits, labels, 2, grads)
    assert_same(actual, defined(logits, labels, grads, 1.0), "right")
    monkeypatch.setattr(definition, "COLUMNS", 32)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same(actual, defined(logits, labels, grads, 1.0), "wrong")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 40), dtypes, seeds)
def test_neither_strides_nor_alignment_nor_place_matter(
    vocab_size: int, offset: int, dtype: torch.dtype, seed: int
) -> None:
    logits = draw("normal 5", (3, vocab_size), dtype, seed)
    labels, grads = labels_and_grads(3, vocab_size, seed)
    expected = evaluate(logits, labels, 1, grads)
    room = torch.full((3, offset + vocab_size + 7), float("nan"), dtype=dtype)
    moved = room[:, offset : offset + vocab_size].copy_(logits)
    assert_same(evaluate(moved, labels, 1, grads), expected, "moved")
    inplace = evaluate(moved, labels, 1)
    from primitives import _C

    _C.vocab_entropy_backward(moved, labels, IGNORED, 0, 1.0, inplace.quads, *grads, moved)
    assert expected.grad is not None
    assert_same_bits(moved, expected.grad, "in place")
    assert bool(room[:, :offset].isnan().all())
    assert bool(room[:, offset + vocab_size :].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_results_are_streamed_and_shared_by_threads_with_the_same_bits(
    dtype: torch.dtype,
) -> None:
    """From 8 MiB on gradients are written around the caches; threads share the tokens."""
    shape = (46, 100_003)  # rows of odd alignment
    logits = draw("half masked", shape, dtype, 5)
    labels, grads = labels_and_grads(shape[0], shape[1], 5)
    whole = evaluate(logits, labels, 1, grads)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_same(evaluate(logits, labels, 1, grads), whole, "3 threads")
    finally:
        torch.set_num_threads(num_threads)
    for token in (0, 7, 45):
        row = slice(token, token + 1)
        alone = evaluate(logits[row], labels[row], 1, grads[:, row])
        assert alone.grad is not None
        assert whole.grad is not None
        assert_same_bits(alone.grad, whole.grad[row], f"token {token}")
