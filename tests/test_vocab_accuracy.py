"""Entropy, log-probability and their gradients against float64."""

import pytest
import torch
from canonical_inputs import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from primitives import vocab_parallel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def logits_of(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    match kind:
        case "normal":
            return torch.randn(shape, generator=g)
        case "normal 5":
            return torch.randn(shape, generator=g) * 5
        case "near 1e4":
            return torch.randn(shape, generator=g) * 4 + 1e4
        case "equal":
            return torch.full(shape, 3.25)
        case "masked":
            z = torch.randn(shape, generator=g) * 3
            z[..., 1:].masked_fill_(torch.rand(z[..., 1:].shape, generator=g) < 0.5, -torch.inf)
            return z
        case "one-hot":
            z = torch.zeros(shape)
            z[..., 3 % shape[-1]] = 30.0
            return z
    raise ValueError(kind)


KINDS = st.sampled_from(["normal", "normal 5", "near 1e4", "equal", "masked", "one-hot"])


def textbook(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and log-probability in float64."""
    log_probs = logits.double().log_softmax(-1)
    entropy = -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)
    return entropy, log_probs.gather(-1, labels[..., None])[..., 0]


@settings(max_examples=60, deadline=None)
@given(KINDS, st.integers(1, 60_000), st.sampled_from(DTYPES), seeds)
def test_errors_against_float64(kind: str, vocab_size: int, dtype: torch.dtype, seed: int) -> None:
    """5e-7 of max(1, H) and of max(1, |log p|): the bounds of docs/canonical-arithmetic.md."""
    logits = logits_of(kind, (3, vocab_size), seed).to(dtype)
    labels = logits.argsort(-1)[:, [-1]][:, 0] if seed % 2 else torch.zeros(3, dtype=torch.int64)
    entropy, log_prob = vocab_parallel.entropy_and_log_prob(logits, labels)
    exact_entropy, exact_log_prob = textbook(logits, labels)
    error = (entropy.double() - exact_entropy).abs() / exact_entropy.clamp(min=1)
    assert float(error.max()) <= 5e-7
    error = (log_prob.double() - exact_log_prob).abs() / exact_log_prob.abs().clamp(min=1)
    assert float(error.max()) <= 5e-7


@settings(max_examples=30, deadline=None)
@given(KINDS, st.integers(2, 3000), st.sampled_from([1.0, 0.6, 3.0]), seeds)
def test_gradients_against_float64(
    kind: str, vocab_size: int, temperature: float, seed: int
) -> None:
    logits = logits_of(kind, (4, vocab_size), seed).requires_grad_()
    labels = torch.tensor([0, vocab_size - 1, vocab_size // 2, 0])
    g = torch.Generator().manual_seed(seed)
    grads = torch.randn(2, 4, generator=g)
    outputs = vocab_parallel.entropy_and_log_prob(logits, labels, temperature=temperature)
    torch.autograd.backward(outputs, tuple(grads))
    p = (logits.detach().double() / temperature).softmax(-1)
    log_p = p.log().clamp(min=-1e4)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    onehot = torch.nn.functional.one_hot(labels, vocab_size)
    exact = grads[0][:, None] * -p * (log_p + entropy) + grads[1][:, None] * (onehot - p)
    # 16 units of 2^-24 of the largest terms: dozens of roundings, of which few are of full size.
    size = grads.abs().sum(0)[:, None] * (1 + entropy)
    assert logits.grad is not None
    error = ((logits.grad.double() - exact / temperature).abs() * temperature / size).max()
    assert float(error) <= 16 * 2.0**-24


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gradients_against_finite_differences(temperature: float) -> None:
    """Of the float32 operator itself: steps of 1e-2 leave about 1e-4 of truncation and noise."""
    labels = torch.tensor([1, -100, 19])
    logits = (torch.randn(3, 20, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()

    def results(z: Tensor) -> tuple[Tensor, ...]:
        entropy, log_prob = vocab_parallel.entropy_and_log_prob(z, labels, temperature=temperature)
        loss = vocab_parallel.cross_entropy(z, labels, z_loss=1e-2, temperature=temperature)
        return entropy, log_prob, loss

    with pytest.warns(UserWarning, match="not a double precision floating point"):
        assert gradcheck(results, (logits,), eps=1e-2, atol=1e-3, rtol=1e-3)


def test_a_wrong_gradient_fails_the_finite_differences() -> None:
    logits = torch.randn(2, 20, requires_grad=True)

    def wrong(z: Tensor) -> Tensor:
        return vocab_parallel.entropy(z) + 0.01 * z.detach().sum()

    with pytest.warns(UserWarning, match="double"), pytest.raises(RuntimeError, match="Jacobian"):
        gradcheck(wrong, (logits,), eps=1e-2, atol=1e-3, rtol=1e-3)
