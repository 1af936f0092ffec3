"""The CUDA kernels of canonical arithmetic, lane by lane on the host: the bits of the CPU.

What only a GPU can show (that its instructions round as they should, speed) is in tests/gpu/.
"""

import ctypes
from pathlib import Path

import canonical_cases
import pytest
import torch
from canonical_cases import CASES, Case, cases, sweeps
from canonical_definition import assert_same_bits
from canonical_emulator import emulated
from canonical_inputs import draw
from emulators import Mistake, build
from hypothesis import given, settings
from hypothesis import strategies as st

from primitives import canonical
from primitives.env import PROPERTY_CASES

NUM_EXAMPLES = max(10, int(PROPERTY_CASES.get()) // 10)


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    return build("canonical")


def compare(library: ctypes.CDLL, case: Case, seed: int = 0, enough_blocks: int = 1) -> None:
    """Raises AssertionError where the device's bits are not the CPU's."""
    expected = case.run()
    with emulated(library, seed, enough_blocks):
        actual = case.run()
    assert len(actual) == len(expected)
    for number, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(got, want, f"{case.function}, tensor {number}")


@pytest.mark.parametrize("name", sorted(CASES))
@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(st.data(), st.integers(0, 2**31), st.sampled_from([1, 1000]))
def test_the_bits_of_the_cpu(
    library: ctypes.CDLL, name: str, data: st.DataObject, seed: int, enough_blocks: int
) -> None:
    """For any shape, dtype, place in memory and order of threads, and with inf, NaN and -0."""
    compare(library, data.draw(cases(name)), seed, enough_blocks)


@pytest.mark.parametrize("case", sweeps(), ids=lambda case: f"{case.function} {case.args[0].dtype}")
def test_every_exponent(library: ctypes.CDLL, case: Case) -> None:
    compare(library, case)


def test_every_function_has_a_case() -> None:
    assert set(CASES) | canonical_cases.WITHOUT_A_CASE == set(canonical.__all__)


# Each of these must be noticed in the calls of ``play``.
TREE, ROWS, COLUMNS, GEMM, ELEMENTS, LAUNCH = (
    f"canonical/cuda/{name}.hpp"
    for name in ("tree", "rows", "columns", "gemm", "elements", "launch")
)
MISTAKES = (
    Mistake("a piece over the end", ELEMENTS, "first + T::kNumel <= n &&", "first < n &&"),
    Mistake("padding of +0", TREE, "x[i] : -0.0f;", "x[i] : 0.0f;"),
    Mistake("no barrier", TREE, "= shared[i];\n  thread.sync_block();", "= shared[i];"),
    Mistake("runs of any length", TREE, "while (run * kWarps < num_chunks) run *= 2;",
            "run = (num_chunks + kWarps - 1) / kWarps;"),
    Mistake("a hidden column", ROWS, "visible ? exp_nonp", "visible + 1 ? exp_nonp"),
    Mistake("every token is the first", COLUMNS, "if (!first) return;", ""),
    Mistake("tokens twice", COLUMNS, "thread, token, tokens, id", "thread, token - 1, tokens, id"),
    Mistake("steps of zeros", GEMM, "static_cast<int>(k - begin)", "kSteps"),
    Mistake("a step too early", GEMM, "b_steps);\n      thread.sync_block();", "b_steps);"),
    Mistake("threads missing", LAUNCH, "return (a + b - 1) / b;", "return a / b;"),
)  # fmt: skip
SAMPLE = MISTAKES[: max(2, NUM_EXAMPLES // 100)]
"""Each takes long to compile; `make properties` makes all."""


def play(library: ctypes.CDLL) -> None:
    """Calls in which each mistake shows."""
    x = draw((3, 2500), torch.float32, 0)
    ids = torch.tensor([1, 0, 1, 1])
    cases = (
        Case("gelu", (draw((1001,), torch.bfloat16, 0),)),
        Case("row_sum", (torch.full((2, 5), -0.0),)),
        Case("softmax", (x,)),
        Case("softmax_backward", (x, canonical.softmax(x))),
        Case("causal_softmax", (draw((1, 9, 9), torch.float16, 0), 0.3)),
        Case("embedding_backward", (draw((4, 9), torch.float16, 0), ids, (1, 2, 9))),
        Case("gemm", (torch.full((1, 1), -1e-30), torch.full((1, 1), 1e-30))),
        Case("gemm", (draw((40, 37), torch.float32, 0), draw((37, 35), torch.float32, 1))),
    )
    for seed in range(2):
        for case in cases:
            compare(library, case, seed, 1000)


def test_without_a_mistake_nothing_is_noticed(library: ctypes.CDLL) -> None:
    play(library)


@pytest.mark.parametrize("mistake", SAMPLE, ids=lambda mistake: mistake.name)
def test_a_mistake_is_noticed(mistake: Mistake, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        play(mistake.build("canonical", tmp_path))
