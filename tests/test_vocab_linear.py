"""Entropy and log-probability from hidden states: those of the logits, without the logits."""

from collections.abc import Callable

import pytest
import torch
from canonical_definition import assert_same_bits
from canonical_inputs import dtypes, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from primitives import vocab_parallel
from primitives.bench.devices import Cpu
from primitives.vocab_parallel.linear_ops import linear_vocab_entropy


def inputs(
    tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=g).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=g).to(dtype)
    return hidden, weight, torch.randint(vocab_size, (tokens,), generator=g)


def segment_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """All logits, from products of one segment each."""
    length = -(-len(weight) // 16)
    return torch.cat([hidden @ w.T for w in weight.split(length)], -1)


def gradients(results: tuple[Tensor, Tensor], seed: int, *of: Tensor) -> tuple[Tensor, ...]:
    grads = torch.randn(2, *results[0].shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(results, of, tuple(grads))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 3000), dtypes, seeds)
def test_results_are_the_bits_of_the_logits(
    tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, seed: int
) -> None:
    hidden, weight, labels = inputs(tokens, hidden_size, vocab_size, dtype, seed)
    logits = segment_logits(hidden, weight)
    expected = vocab_parallel.entropy_and_log_prob(logits, labels, temperature=0.7)
    actual = vocab_parallel.linear_entropy_and_log_prob(hidden, weight, labels, temperature=0.7)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    assert_same_bits(vocab_parallel.linear_entropy(hidden, weight, temperature=0.7), expected[0])
    log_prob = vocab_parallel.linear_log_prob(hidden, weight, labels, temperature=0.7)
    assert_same_bits(log_prob, expected[1])
    loss = vocab_parallel.linear_cross_entropy(hidden, weight, labels, z_loss=0.1)
    assert_same_bits(loss, vocab_parallel.cross_entropy(logits, labels, z_loss=0.1))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 2000), seeds)
def test_gradients_against_float64(
    tokens: int, hidden_size: int, vocab_size: int, seed: int
) -> None:
    hidden, weight, labels = inputs(tokens, hidden_size, vocab_size, torch.float32, seed)
    hidden, weight = hidden / hidden_size**0.5, weight
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    actual = gradients(vocab_parallel.linear_entropy_and_log_prob(*leaves, labels), seed, *leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    log_probs = (exact[0] @ exact[1].T).log_softmax(-1)
    results = (
        -(log_probs.exp() * log_probs).sum(-1), log_probs.gather(-1, labels[:, None])[:, 0]
    )  # fmt: skip
    for a, e in zip(actual, gradients(results, seed, *exact), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_gradients_of_bfloat16_are_those_of_the_logits_rounded() -> None:
    hidden, weight, labels = inputs(6, 32, 700, torch.bfloat16, 3)
    leaves = hidden.requires_grad_(), (weight * 0.2).detach().requires_grad_()
    actual = gradients(vocab_parallel.linear_entropy_and_log_prob(*leaves, labels), 0, *leaves)
    results = vocab_parallel.entropy_and_log_prob(leaves[0] @ leaves[1].T, labels)
    for a, e in zip(actual, gradients(results, 0, *leaves), strict=True):
        size = float(e.float().abs().max())
        assert float((a.float() - e.float()).abs().max()) < 0.02 * size


def test_forward_needs_a_small_part_of_the_memory_of_the_logits() -> None:
    hidden, weight, labels = inputs(512, 64, 50_000, torch.bfloat16, 0)
    logits_nbytes = 512 * 50_000 * 2

    def fused() -> None:
        vocab_parallel.linear_entropy_and_log_prob(hidden, weight, labels)

    fused()
    grown = Cpu().extra_nbytes(fused)
    assert grown is not None, "the peak of the resident set cannot be read here"
    assert grown < logits_nbytes / 8
    kept = Cpu().extra_nbytes(lambda: (hidden @ weight.T).float())
    assert kept is not None
    assert kept > logits_nbytes  # the measure sees it


H, W, LABELS = inputs(2, 4, 40, torch.float32, 0)
ERRORS: list[tuple[Callable[[], object], str]] = [
    (lambda: vocab_parallel.linear_entropy(H.double(), W), "hidden: expected .* torch.float64"),
    (
        lambda: vocab_parallel.linear_entropy(H, W.T),
        r"weight: expected \[columns, 4\] .* \[4, ",
    ),
    (lambda: vocab_parallel.linear_entropy(H, W.half()), "weight: .* of torch.float16"),
    (lambda: vocab_parallel.linear_log_prob(H, W, LABELS[:1]), r"labels: expected \[2\]"),
    (lambda: vocab_parallel.linear_log_prob(H, W, LABELS + 40), r"at \[0\] on rank 0"),
    (lambda: vocab_parallel.linear_entropy(H, W, vocab_size=39), "puts 39 on rank 0 of 1, got 40"),
    (lambda: vocab_parallel.linear_entropy(H, W, temperature=0), "temperature: expected"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_a_wrong_argument_is_one_clear_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_opcheck() -> None:
    hidden, weight = H.clone().requires_grad_(), W.clone().requires_grad_()
    opcheck(linear_vocab_entropy, (hidden, weight, LABELS, "", None, -100, 0.7))
