"""The CUDA kernels of the vocabulary entropy, lane by lane on the host: the bits of the CPU.

What only a GPU can show (that its instructions round as they should, speed) is in tests/gpu/.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from canonical_definition import assert_same_bits
from canonical_inputs import dtypes, seeds
from emulators import Mistake, build
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_vocab_accuracy import KINDS, logits_of, textbook
from test_vocab_bits import assert_same, families, labels_and_grads, scales, vocab_sizes
from torch import Tensor
from vocab_cases import IGNORED, NATIVE, draw, evaluate
from vocab_emulator import Emulator, EmulatorError

from primitives.env import PROPERTY_CASES

NUM_EXAMPLES = int(PROPERTY_CASES.get())
tps = st.sampled_from([1, 1, 2, 4, 8, 16])


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    return build("vocab_entropy")


def compare(
    emulator: Emulator, logits: Tensor, seed: int, *, scale: float = 1.0, num_ranks: int = 1,
    offset: int = 0, gap: int = 0,
) -> None:  # fmt: skip
    """Raises AssertionError where the device's bits are not the CPU's; in place, too."""
    num_tokens, vocab_size = logits.shape
    labels, grads = labels_and_grads(num_tokens, vocab_size, seed)
    expected = evaluate(logits, labels, num_ranks, grads, scale)
    room = torch.full((num_tokens, offset + vocab_size + gap), torch.nan, dtype=logits.dtype)
    moved = room[:, offset : offset + vocab_size].copy_(logits)
    actual = evaluate(moved, labels, num_ranks, grads, scale, emulator)
    assert_same(actual, expected, f"tp{num_ranks}")
    emulator.backward(moved, labels, IGNORED, 0, scale, actual.quads, *grads, moved)
    assert expected.grad is not None
    assert_same_bits(moved, expected.grad, "in place")
    assert bool(room[:, :offset].isnan().all() & room[:, offset + vocab_size :].isnan().all())


@settings(max_examples=NUM_EXAMPLES // 2, deadline=None)
@given(
    families, vocab_sizes, st.integers(1, 3), dtypes, scales, tps, st.integers(0, 16),
    st.integers(0, 16), st.sampled_from([1, 8, 1024]), seeds,
)  # fmt: skip
@example("normal 5", 16384, 2, torch.float32, 1.0, 1, 0, 0, 1, 0)  # whole blocks only
@example("normal 5", 50257, 1, torch.bfloat16, 1.0, 1, 3, 2, 1, 1)  # nothing is aligned
@example("nan", 3, 2, torch.float16, 1.0, 2, 0, 0, 1024, 2)  # most segments are empty
@example("normal 5", 600_000, 1, torch.bfloat16, 0.7, 1, 1, 0, 1, 3)  # 37 blocks a segment
def test_the_bits_of_the_cpu(
    library: ctypes.CDLL, family: str, vocab_size: int, num_tokens: int, dtype: torch.dtype,
    scale: float, num_ranks: int, offset: int, gap: int, enough_blocks: int, seed: int,
) -> None:  # fmt: skip
    """For any shape, place in memory, tp, cut of a row and order of threads."""
    logits = draw(family, (num_tokens, vocab_size), dtype, seed)
    emulator = Emulator(library, "portable", enough_blocks, seed)
    compare(emulator, logits, seed, scale=scale, num_ranks=num_ranks, offset=offset, gap=gap)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3000), dtypes, seeds)
def test_no_labels_and_missing_gradients(
    library: ctypes.CDLL, vocab_size: int, dtype: torch.dtype, seed: int
) -> None:
    logits = draw("normal 5", (2, vocab_size), dtype, seed)
    grads = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
    emulator = Emulator(library, seed=seed)
    expected, actual = (evaluate(logits, None, 1, grads, 1.0, k) for k in (NATIVE, emulator))
    assert_same(actual, expected, "no labels")
    quads = expected.quads
    for given_ in ((grads[0], None, None), (None, grads[1], None), (None, None, grads[2])):
        outs = torch.empty_like(logits), torch.empty_like(logits)
        for kernels, out in zip((NATIVE, emulator), outs, strict=True):
            kernels.backward(logits, None, IGNORED, 0, 1.0, quads, *given_, out)
        assert_same_bits(outs[1], outs[0])


@settings(max_examples=20, deadline=None)
@given(KINDS, vocab_sizes, dtypes, seeds)
def test_device_mode_is_near_float64(
    library: ctypes.CDLL, kind: str, vocab_size: int, dtype: torch.dtype, seed: int
) -> None:
    """With the host's exp2 in place of ex2: that everything but the instruction is right."""
    logits = logits_of(kind, (2, vocab_size), seed).to(dtype)
    labels = logits.argmax(-1)
    grads = torch.ones(3, 2)
    actual = evaluate(logits, labels, 1, grads, 1.0, Emulator(library, "device"))
    portable = evaluate(logits, labels, 1, grads, 1.0)
    entropy, _ = textbook(logits, labels)
    assert float(((actual.entropy - entropy).abs() / entropy.clamp(min=1)).max()) <= 1e-6
    assert actual.grad is not None
    assert portable.grad is not None
    torch.testing.assert_close(actual.grad, portable.grad, rtol=1.6e-2, atol=1e-6)


def test_a_segment_beyond_shared_memory_is_refused(library: ctypes.CDLL) -> None:
    logits, quads = torch.zeros(1, 1), torch.empty(1, 4)
    with pytest.raises(EmulatorError, match="more than 4,194,304 columns"):
        Emulator(library).forward(logits, None, IGNORED, 0, 4_194_305, 16, 1.0, quads)


FORWARD, BACKWARD, LAUNCH = (
    f"vocab_entropy/{name}.hpp" for name in ("device_forward", "device_backward", "launch")
)
BY_HALVES, DOUBLING = "mask = kLanes / 2; mask > 0; mask /= 2", "mask = 1; mask < kLanes; mask *= 2"
MISTAKES = (
    Mistake("a tail one longer", FORWARD, "first + i < n) T::set", "first + i <= n) T::set"),
    Mistake("another order", FORWARD, f"{BY_HALVES}) {{  //", f"{DOUBLING}) {{  //"),
    Mistake("no barrier", FORWARD, "    thread.sync_block();\n    for", "    for"),
    Mistake("a last piece missing", LAUNCH, "Kernel::kSlots + 1;", "Kernel::kSlots;"),
    Mistake("a piece over the end", FORWARD, "+ T::kNumel <= n)", "+ T::kNumel <= n + 1)"),
    Mistake("a step less", FORWARD, "kSteps = kRows + 1;", "kSteps = kRows;"),
    Mistake("a warp alone", FORWARD, "if (warp == 0) c", "if (warp == 0) thread.sync_block(), c"),
    Mistake("a fold too far", FORWARD, "i + half < n;", "i + half <= n;"),
    Mistake("a target one off", BACKWARD, "target == first + j", "target == first + j + 1"),
    Mistake("a piece twice", BACKWARD, "begin + i * kThreads", "begin + i * (kThreads - 1)"),
)
SAMPLE = MISTAKES[: max(2, NUM_EXAMPLES // 1000)]
"""Each takes seconds to compile; `make properties` makes all."""


def play(library: ctypes.CDLL) -> None:
    """Calls of every path of the kernels."""
    for vocab_size, dtype, enough_blocks in (
        (16384, torch.bfloat16, 1),
        (40_000, torch.bfloat16, 1),
        (1001, torch.float32, 8),
        (4097, torch.float16, 1024),
    ):
        logits = draw("normal 5", (2, vocab_size), dtype, 0)
        compare(Emulator(library, enough_blocks=enough_blocks), logits, 1, offset=3)


def test_without_a_mistake_nothing_is_noticed(library: ctypes.CDLL) -> None:
    play(library)


@pytest.mark.parametrize("mistake", SAMPLE, ids=lambda mistake: mistake.name)
def test_a_mistake_is_noticed(mistake: Mistake, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, EmulatorError)):
        play(mistake.build("vocab_entropy", tmp_path))
