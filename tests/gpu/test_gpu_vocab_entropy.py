"""The CUDA kernels of the vocabulary entropy on a GPU."""

from collections.abc import Callable

import pytest
import torch
from canonical_definition import assert_same_bits
from canonical_inputs import dtypes, seeds
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_vocab_accuracy import KINDS, logits_of, textbook
from test_vocab_bits import assert_same, families, labels_and_grads, scales, vocab_sizes
from torch import Tensor
from torch.library import opcheck
from vocab_cases import IGNORED, NATIVE, Outcome, draw, evaluate

from primitives import vocab_parallel
from primitives.env import PROPERTY_CASES
from primitives.vocab_parallel.ops import vocab_entropy

CUDA = torch.device("cuda", 0)
NUM_EXAMPLES = max(1000, int(PROPERTY_CASES.get()))
DEVICE_ERROR = 1e-6
"""Of entropy and log_prob in mode "device", over max(1, the value). Expected, not yet measured."""


def on_cpu(outcome: Outcome) -> Outcome:
    assert outcome.grad is not None
    return Outcome(
        outcome.entropy.cpu(), outcome.log_prob.cpu(), outcome.log_sum_exp.cpu(),
        outcome.quads.cpu(), outcome.grad.cpu(),
    )  # fmt: skip


def evaluate_on_gpu(
    logits: Tensor, labels: Tensor, num_ranks: int, grads: Tensor, scale: float
) -> Outcome:
    return on_cpu(evaluate(logits.to(CUDA), labels.to(CUDA), num_ranks, grads.to(CUDA), scale))


@pytest.mark.timeout(1800)
@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(
    families, vocab_sizes, st.integers(1, 4), dtypes, scales, st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(0, 16), st.integers(0, 16), seeds,
)  # fmt: skip
@example("normal 5", 155_136, 4, torch.bfloat16, 1.0, 1, 0, 0, 0)
@example("normal 5", 600_000, 2, torch.bfloat16, 0.7, 1, 1, 0, 1)
@example("normal 5", 2_000, 1500, torch.float16, 1.0, 2, 3, 0, 2)  # a row is not cut
def test_portable_bits_are_those_of_the_cpu(
    family: str, vocab_size: int, num_tokens: int, dtype: torch.dtype, scale: float,
    num_ranks: int, offset: int, gap: int, seed: int,
) -> None:  # fmt: skip
    logits = draw(family, (num_tokens, vocab_size), dtype, seed)
    labels, grads = labels_and_grads(num_tokens, vocab_size, seed)
    expected = evaluate(logits, labels, num_ranks, grads, scale)
    room = torch.full((num_tokens, offset + vocab_size + gap), torch.nan, dtype=dtype, device=CUDA)
    moved = room[:, offset : offset + vocab_size].copy_(logits)
    arguments = (labels.to(CUDA), num_ranks, grads.to(CUDA), scale)
    actual = evaluate(moved, *arguments)
    assert_same(on_cpu(actual), expected, f"{family}, tp{num_ranks}")
    NATIVE.backward(moved, arguments[0], IGNORED, 0, scale, actual.quads, *arguments[2], moved)
    assert expected.grad is not None
    assert_same_bits(moved.cpu(), expected.grad, "in place")
    assert bool(room[:, :offset].isnan().all() & room[:, offset + vocab_size :].isnan().all())


def test_another_result_is_told_apart() -> None:
    logits = draw("normal 5", (2, 5000), torch.float32, 0)
    labels, grads = labels_and_grads(2, 5000, 0)
    actual = evaluate_on_gpu(logits, labels, 1, grads, 1.0)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same(actual, evaluate(logits + 1e-3, labels, 1, grads, 1.0), "wrong")


@settings(max_examples=100, deadline=None)
@given(KINDS, st.integers(1, 160_000), dtypes, seeds)
def test_device_mode_against_float64(
    kind: str, vocab_size: int, dtype: torch.dtype, seed: int
) -> None:
    logits = logits_of(kind, (3, vocab_size), seed).to(dtype)
    labels = logits.argmax(-1)
    entropy, log_prob = vocab_parallel.entropy_and_log_prob(
        logits.to(CUDA), labels.to(CUDA), mode="device"
    )
    for actual, exact in zip((entropy, log_prob), textbook(logits, labels), strict=True):
        error = (actual.cpu().double() - exact).abs() / exact.abs().clamp(min=1)
        assert float(error.max()) <= DEVICE_ERROR


@settings(max_examples=50, deadline=None)
@given(KINDS, vocab_sizes, dtypes, seeds)
def test_device_gradients_are_near_the_portable_ones(
    kind: str, vocab_size: int, dtype: torch.dtype, seed: int
) -> None:
    logits = logits_of(kind, (3, vocab_size), seed).to(dtype).to(CUDA)
    labels = logits.argmax(-1)
    grads = []
    for mode in ("portable", "device"):
        leaf = logits.clone().requires_grad_()
        sum(vocab_parallel.entropy_and_log_prob(leaf, labels, mode=mode)).sum().backward()  # type: ignore[union-attr]
        assert leaf.grad is not None
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1.6e-2, atol=1e-6)


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", ["portable", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_places_and_memory(dtype: torch.dtype, mode: str) -> None:
    """Few and many tokens, aligned or not, out of place and in place; for the sanitizers, too."""
    for shape in ((2, 1), (3, 1000), (1, 40_001), (1100, 520), (5, 16 * 2048)):
        for offset in (0, 1):
            room = torch.randn(shape[0], shape[1] + offset, device=CUDA).to(dtype)
            logits = room[:, offset:].detach().requires_grad_()
            labels = torch.arange(shape[0], device=CUDA) % shape[1]
            results = vocab_parallel.entropy_and_log_prob(logits, labels, mode=mode)
            (results[0] - results[1]).sum().backward()
            assert logits.grad is not None
            hidden = logits.detach().clone().requires_grad_() * 1
            again = vocab_parallel.entropy_and_log_prob(
                hidden, labels, inplace_backward=True, mode=mode
            )
            (again[0] - again[1]).sum().backward()
            assert_same_bits(hidden.detach().cpu(), logits.grad.cpu())
            assert_same_bits(again[0].detach().cpu(), results[0].detach().cpu())


@pytest.mark.parametrize("mode", ["portable", "device"])
def test_opcheck(mode: str) -> None:
    logits = torch.randn(2, 3, 40, device=CUDA)
    labels = torch.tensor([[0, 39, -100], [17, 5, 5]], device=CUDA)
    for requires_grad in (False, True):
        leaf = logits.clone().requires_grad_(requires_grad)
        opcheck(vocab_entropy, (leaf, labels, "", None, -100, 0.7, False, mode))


def test_compiled_is_the_same_bits() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        entropy = vocab_parallel.entropy(logits)
        return (vocab_parallel.cross_entropy(logits, labels, z_loss=0.01) - 0.25 * entropy).sum()

    logits = torch.randn(6, 400, device=CUDA, requires_grad=True)
    labels = torch.arange(6, device=CUDA)
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        (grad,) = torch.autograd.grad(function(logits, labels), logits)
        grads.append(grad.cpu())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)  # sums of others


def test_a_bad_label_is_named_unless_nothing_may_be_read_back() -> None:
    logits = torch.randn(2, 3, 40, device=CUDA)
    labels = torch.tensor([[0, 39, -100], [40, 5, 5]], device=CUDA)
    with pytest.raises(ValueError, match=r"got 40 at \[1, 0\] on rank 0"):
        vocab_parallel.log_prob(logits, labels)
    unchecked = vocab_parallel.log_prob(logits, labels, check_input=False)
    assert float(unchecked[1, 0]) == -torch.inf
    assert bool(unchecked[0].isfinite().all())


@pytest.mark.sanitize
def test_a_stream_of_the_caller_is_used() -> None:
    """What is enqueued behind a long copy on another stream sees what that copy brings."""
    source = torch.randn(64, 50_000).pin_memory()
    labels = torch.zeros(64, dtype=torch.int64, device=CUDA)
    expected = vocab_parallel.log_prob(source, labels.cpu())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        logits = torch.zeros(64, 50_000, device=CUDA)
        torch.cuda._sleep(50_000_000)
        logits.copy_(source, non_blocking=True)
        actual = vocab_parallel.log_prob(logits, labels, check_input=False)
    stream.synchronize()
    assert_same_bits(actual.cpu(), expected)


def captured(
    work: Callable[[], tuple[Tensor, ...]],
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


@pytest.mark.parametrize("mode", ["portable", "device"])
@pytest.mark.parametrize("num_tokens", [4, 1500])
def test_a_graph_replays_forward_and_backward(num_tokens: int, mode: str) -> None:
    logits = torch.zeros(num_tokens, 3000, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(num_tokens, dtype=torch.int64, device=CUDA)

    def work() -> tuple[Tensor, ...]:
        entropy, log_prob = vocab_parallel.entropy_and_log_prob(
            logits, labels, mode=mode, check_input=False
        )
        (grad,) = torch.autograd.grad((entropy + log_prob).sum(), logits)
        return entropy.detach(), log_prob.detach(), grad

    graph, results = captured(work)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            logits.copy_(torch.randn(num_tokens, 3000, generator=generator) * 4)
            labels.copy_(torch.randint(3000, (num_tokens,), generator=generator))
        graph.replay()
        for replayed, eager in zip(results, work(), strict=True):
            assert_same_bits(replayed.cpu(), eager.cpu())


def test_a_capture_that_would_read_back_is_refused() -> None:
    logits, labels = torch.zeros(2, 30, device=CUDA), torch.zeros(2, dtype=torch.int64, device=CUDA)
    with pytest.raises(ValueError, match="check_input: expected False while a CUDA graph"):
        captured(lambda: (vocab_parallel.log_prob(logits, labels),))


def test_cuda_names_its_error() -> None:
    logits = torch.zeros(1, 16 * 4_200_000, device=CUDA)
    with pytest.raises(
        RuntimeError, match="vocab_entropy_forward on cuda:0: segments of more than"
    ):
        vocab_parallel.entropy(logits)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_logits_is_used_and_the_current_one_kept() -> None:
    logits = torch.randn(3, 5000)
    labels = torch.tensor([0, 4999, 7])
    on_second = vocab_parallel.log_prob(logits.to("cuda:1"), labels.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_same_bits(on_second.cpu(), vocab_parallel.log_prob(logits, labels))
