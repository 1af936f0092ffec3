"""The canonical GEMM beside torch.mm, one thread, inputs and output of one dtype."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from primitives import canonical

NUM_ROUNDS = 9


@dataclass(frozen=True)
class Row:
    """C[m, n] = A[m, k] B[k, n]; speeds are medians in GFLOP/s."""

    m: int
    n: int
    k: int
    dtype: str
    canonical_gflop_s: float
    torch_gflop_s: float


def measure(shapes: list[tuple[int, int, int]], dtype: str = "float32") -> list[Row]:
    """Both sides in turn for each (m, n, k).

    Args:
        dtype: torch's name of float32, float16 or bfloat16.
    """
    kind = getattr(torch, dtype)
    torch.set_num_threads(1)
    rows = []
    for m, n, k in shapes:
        a, b = torch.randn(m, k).to(kind), torch.randn(k, n).to(kind)
        num_calls = max(1, int(2e8 / (2 * m * n * k)))
        sides: tuple[Callable[[], object], ...] = (
            lambda a=a, b=b: canonical.gemm(a, b, out_dtype=kind),  # type: ignore[misc]
            lambda a=a, b=b: torch.mm(a, b),  # type: ignore[misc]
        )
        samples: list[list[float]] = [[], []]
        for _ in range(NUM_ROUNDS):
            for function, times in zip(sides, samples, strict=True):
                start = time.perf_counter()
                for _ in range(num_calls):
                    function()
                times.append((time.perf_counter() - start) / num_calls)
        speeds = [2e-9 * m * n * k / statistics.median(s) for s in samples]
        rows.append(Row(m, n, k, dtype, *speeds))
    return rows
