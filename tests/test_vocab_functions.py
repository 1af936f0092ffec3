"""The functions of primitives.vocab_parallel: options, errors, autograd, torch.compile."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from canonical_definition import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from primitives import _C, vocab_parallel
from primitives.vocab_parallel.ops import vocab_entropy

LOGITS = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) * 3
LABELS = torch.tensor([[0, 39, -100], [17, 5, 5]])


def gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_shapes_and_agreement_of_the_functions() -> None:
    entropy, log_prob = vocab_parallel.entropy_and_log_prob(LOGITS, LABELS)
    assert entropy.shape == log_prob.shape == (2, 3)
    assert entropy.dtype == log_prob.dtype == torch.float32
    assert_same_bits(vocab_parallel.entropy(LOGITS), entropy)
    assert_same_bits(vocab_parallel.log_prob(LOGITS, LABELS), log_prob)
    assert_same_bits(vocab_parallel.cross_entropy(LOGITS, LABELS), 0.0 - log_prob)


def test_the_logits_are_not_altered_and_keep_their_strides() -> None:
    wide = torch.randn(5, 7, 64)
    for logits in (wide[:, 1:3, 3:50], wide.transpose(0, 1), wide.mT, wide[0, 0, ::2]):
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        before = wide.clone()
        leaf = logits.detach().requires_grad_()
        entropy, log_prob = vocab_parallel.entropy_and_log_prob(leaf, labels)
        (entropy + log_prob).sum().backward()
        assert_same_bits(wide, before)
        plain = logits.clone(memory_format=torch.contiguous_format)
        assert_same_bits(entropy.detach(), vocab_parallel.entropy(plain))
        assert leaf.grad is not None
        both = gradient(lambda z: sum(vocab_parallel.entropy_and_log_prob(z, labels)), plain)  # type: ignore[arg-type,return-value]  # noqa: B023
        assert_same_bits(leaf.grad, both)


def test_ignored_tokens_have_no_log_prob_and_no_gradient() -> None:
    ignored = LABELS == -100
    log_prob = vocab_parallel.log_prob(LOGITS, LABELS)
    assert log_prob[ignored].tolist() == [0.0]
    assert bool((log_prob[~ignored] < 0).all())
    grad = gradient(lambda z: vocab_parallel.log_prob(z, LABELS), LOGITS)
    assert not grad[ignored].any()
    assert bool((grad[~ignored] != 0).all())
    labels = torch.where(ignored, 7, LABELS)
    assert_same_bits(vocab_parallel.log_prob(LOGITS, labels, ignore_index=7), log_prob)
    nan = torch.where(ignored[..., None], torch.nan, LOGITS)  # whatever an ignored token's are
    assert_same_bits(vocab_parallel.log_prob(nan, LABELS), log_prob)
    assert_same_bits(gradient(lambda z: vocab_parallel.log_prob(z, LABELS), nan), grad)


def test_temperature_divides_the_logits() -> None:
    for temperature in (0.5, 2.0, 0.25):  # powers of two: exact
        expected = vocab_parallel.entropy_and_log_prob(LOGITS / temperature, LABELS)
        actual = vocab_parallel.entropy_and_log_prob(LOGITS, LABELS, temperature=temperature)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


def test_z_loss_is_that_of_the_formula() -> None:
    leaf = LOGITS.clone().requires_grad_()
    loss = vocab_parallel.cross_entropy(leaf, LABELS, z_loss=0.1)
    loss.sum().backward()
    exact = LOGITS.double().requires_grad_()
    lse = exact.logsumexp(-1)
    labels = LABELS.clamp(min=0)
    plain = lse - exact.gather(-1, labels[..., None])[..., 0]
    expected = torch.where(LABELS == -100, 0, plain + 0.1 * lse * lse)
    expected.sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_masked_logits_are_finite_and_a_masked_token_is_nan() -> None:
    masked = LOGITS.clone()
    masked[..., 20:] = -torch.inf
    labels = LABELS.clamp(max=19)
    entropy, log_prob = vocab_parallel.entropy_and_log_prob(masked, labels)
    assert bool(entropy.isfinite().all() & log_prob.isfinite().all())
    grad = gradient(lambda z: vocab_parallel.log_prob(z, labels), masked)
    assert bool(grad.isfinite().all())
    assert not grad[..., 20:].any()
    assert vocab_parallel.log_prob(masked, LABELS)[0, 1] == -torch.inf
    nothing = torch.full((1, 8), -torch.inf)
    assert bool(vocab_parallel.entropy(nothing).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inplace_backward_is_the_same_in_the_memory_of_the_logits(dtype: torch.dtype) -> None:
    def both(z: Tensor, inplace: bool) -> Tensor:
        entropy, log_prob = vocab_parallel.entropy_and_log_prob(z, LABELS, inplace_backward=inplace)
        return entropy * 0.3 - log_prob

    logits = LOGITS.to(dtype)
    expected = gradient(lambda z: both(z, False), logits)
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1
    both(hidden, True).sum().backward()
    assert leaf.grad is not None
    assert_same_bits(leaf.grad, expected)
    assert_same_bits(hidden.detach(), expected)  # no memory of its own

    hidden = leaf * 1
    loss = both(hidden, True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="that are no leaf of autograd, got a leaf"):
        both(leaf, True)
    with pytest.raises(ValueError, match=r"expected contiguous logits .* got strides"):
        both((leaf * 1).transpose(0, 1), True)
    assert_same_bits(both(logits, True), both(logits, False))  # no gradient asked for: no matter


def test_a_second_derivative_is_an_error() -> None:
    leaf = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(vocab_parallel.entropy(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="vocab_entropy_backward is not implemented"):
        grad.sum().backward()
    loss = vocab_parallel.entropy(leaf * 1, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match=r"inplace_backward: .* create_graph=False"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 5), (16,), (1, 1)])
def test_few_tokens(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    entropy, log_prob = vocab_parallel.entropy_and_log_prob(logits, labels)
    assert entropy.shape == log_prob.shape == shape[:-1]
    (entropy + log_prob).sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == shape


NO_LABELS = torch.zeros(2, 3, dtype=torch.int64)
ERRORS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: vocab_parallel.log_prob(LOGITS, LABELS + 1),
        r"labels: expected 0 <= label < 40 or ignore_index, got 40 at \[0, 1\] on rank 0",
    ),
    (
        lambda: vocab_parallel.cross_entropy(LOGITS, LABELS, ignore_index=0),
        r"got -100 at \[0, 2\] on rank 0",
    ),
    (lambda: vocab_parallel.log_prob(LOGITS, LABELS[0]), r"expected \[2, 3\] .* got \[3\]"),
    (lambda: vocab_parallel.log_prob(LOGITS, LABELS.int()), "got .* of torch.int32 on cpu"),
    (lambda: vocab_parallel.entropy(LOGITS.double()), "got .* of torch.float64, Strided, on cpu"),
    (lambda: vocab_parallel.entropy(LOGITS.to_sparse()), "expected a dense .* Sparse, on cpu"),
    (lambda: vocab_parallel.entropy(LOGITS[..., :0]), "vocab_size: expected 1 to .* got 0"),
    (lambda: vocab_parallel.entropy(torch.tensor(1.0)), r"\[..., columns\] .* got \[\]"),
    (
        lambda: vocab_parallel.entropy(LOGITS, vocab_size=41),
        "a vocabulary of 41 in segments of 3 columns puts 41 on rank 0 of 1, got 40$",
    ),
    (lambda: vocab_parallel.entropy(LOGITS, vocab_size=2**63 - 1), r"expected 1 to 2\^48 columns"),
    (lambda: vocab_parallel.entropy(LOGITS, temperature=0.0), "temperature: expected .* got 0$"),
    (lambda: vocab_parallel.entropy(LOGITS, temperature=-1.0), "temperature: .* got -1$"),
    (lambda: vocab_parallel.entropy(LOGITS, temperature=math.nan), "temperature: .* got nan"),
    (lambda: vocab_parallel.entropy(LOGITS, temperature=1e-300), "temperature: .* got 1e-300"),
    (
        lambda: vocab_parallel.entropy(LOGITS, mode="fast"),
        "mode: expected one of portable, device, got 'fast'",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_a_wrong_argument_is_one_clear_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_kernels_there_are_none_for() -> None:
    meta, quads = LOGITS[0].to("meta"), torch.empty(3, 4, device="meta")
    message = r"they are on meta, but this build of primitives has kernels for the CPU( and CUDA)?$"
    with pytest.raises(ValueError, match=message):
        _C.vocab_entropy_forward(meta, None, -100, 0, 3, 16, 1.0, quads)
    with pytest.raises(ValueError, match="mode: expected one of portable, device, got 'fast'"):
        _C.vocab_entropy_forward(LOGITS[0], None, -100, 0, 3, 16, 1.0, torch.empty(3, 4), "fast")


def test_both_modes_are_one_on_the_cpu() -> None:
    for mode in ("portable", "device"):
        results = vocab_parallel.entropy_and_log_prob(LOGITS, LABELS, mode=mode)
        for actual, expected in zip(
            results, vocab_parallel.entropy_and_log_prob(LOGITS, LABELS), strict=True
        ):
            assert_same_bits(actual, expected)


def test_unchecked_a_label_outside_has_no_probability() -> None:
    leaf = LOGITS.clone().requires_grad_()
    log_prob = vocab_parallel.log_prob(leaf, LABELS + 1, check_input=False)  # 40 of 40 at [0, 1]
    assert log_prob[0, 1] == -torch.inf
    inside = torch.tensor([[1, 38, -99], [18, 6, 6]]).clamp(min=0)
    expected = vocab_parallel.log_prob(LOGITS, inside)
    assert_same_bits(log_prob.detach()[1], expected[1])
    log_prob[1].sum().backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(labels: Tensor | None, dtype: torch.dtype) -> None:
    for requires_grad in (False, True):
        logits = LOGITS.to(dtype, copy=True).requires_grad_(requires_grad)
        opcheck(vocab_entropy, (logits, labels, "", None, -100, 0.7, False))
    quads = vocab_entropy(logits.detach(), labels, "", None, -100, 0.7, False)[3]
    gradients = torch.ones(2, 3), None if labels is None else torch.ones(2, 3), None
    for backward in (
        torch.ops.primitives.vocab_entropy_backward.default,
        torch.ops.primitives.vocab_entropy_backward_.default,
    ):
        arguments = (logits.detach().clone(), labels, quads, *gradients, "", None, -100, 0.7)
        opcheck(backward, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_the_same_bits(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # another may be of another build

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden @ weight.T
        entropy, log_prob = vocab_parallel.entropy_and_log_prob(
            logits, LABELS, inplace_backward=True
        )
        nll = vocab_parallel.cross_entropy(logits, LABELS, z_loss=0.01)
        return (nll - 0.25 * entropy).sum(), log_prob

    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def eager(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits = h @ w.T
        entropy, log_prob = vocab_parallel.entropy_and_log_prob(logits, LABELS)
        nll = vocab_parallel.cross_entropy(logits, LABELS, z_loss=0.01)
        return (nll - 0.25 * entropy).sum(), log_prob

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    results = []
    for function in (eager, compiled):
        value, log_prob = function(hidden, weight)
        grads = torch.autograd.grad(value, (hidden, weight))
        results.append((log_prob.detach(), *grads))
    assert_same_bits(results[1][0], results[0][0])
    for actual, expected in zip(results[1][1:], results[0][1:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # of other matmuls


def test_compiled_autograd_is_the_same_bits() -> None:
    leaf = LOGITS.clone().requires_grad_()
    expected = gradient(vocab_parallel.entropy, LOGITS)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        vocab_parallel.entropy(leaf).sum().backward()
    assert leaf.grad is not None
    assert_same_bits(leaf.grad, expected)


@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.lists(st.integers(-2, 11) | st.integers(-(2**63), 2**63 - 1), max_size=64),
    st.sampled_from([-100, -1, 3]),
)
def test_the_first_bad_label_is_named(shape: list[int], found: list[int], ignored: int) -> None:
    numel = math.prod(shape)
    labels = torch.tensor((found + [0] * numel)[:numel], dtype=torch.int64).view(shape)
    bad = (labels != ignored) & ((labels < 0) | (labels >= 10))
    logits = torch.zeros(*shape, 10)
    if not bool(bad.any()):
        assert vocab_parallel.log_prob(logits, labels, ignore_index=ignored).shape == labels.shape
        return
    where = [int(i) for i in bad.nonzero()[0]]
    got = int(labels[tuple(where)])
    with pytest.raises(ValueError, match=re.escape(f"got {got} at {where} on rank 0")):
        vocab_parallel.log_prob(logits, labels, ignore_index=ignored)
