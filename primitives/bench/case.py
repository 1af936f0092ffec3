"""What one line of the benchmark measures: sizes, and how its figures are derived.

Sizes and bandwidths are those of nccl-tests: ``nbytes`` S is the whole array (all_gather: the
output; reduce_scatter and all_to_all: the input of one rank), ``algbw`` = S / t, and ``busbw``
multiplies it with the share that must cross a rank's link, so that it is comparable between world
sizes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

OPS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "barrier")
REDUCING = ("reduce_scatter", "all_reduce")
ALWAYS_IN_PLACE = ("all_reduce", "broadcast")
"""What c10d can do in place only."""
NEVER_IN_PLACE = ("all_to_all", "barrier")
REDUCE_OPS = ("sum", "prod", "min", "max", "avg")
DTYPES = {
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
    "int64": "int64",
    "half": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "double": "float64",
}
"""nccl-tests' name -> torch's and NumPy's."""


def storage_dtype(dtype: str) -> "np.dtype[Any]":
    """The NumPy dtype that holds ``dtype``: bfloat16, which NumPy lacks, as its bits."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


@dataclass(frozen=True)
class Case:
    """One operation at one size."""

    op: str
    nbytes: int
    """The whole array; a multiple of world_size elements."""
    dtype: str
    """As torch names it."""
    reduce_op: str
    root: int
    world_size: int
    in_place: bool

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return storage_dtype(self.dtype).itemsize

    @property
    def numel(self) -> int:
        """Elements of the whole array."""
        return self.nbytes // self.itemsize

    @property
    def count(self) -> int:
        """nccl-tests' column: elements of a rank's part, or of the buffer where there are none."""
        whole = self.op in ("all_reduce", "broadcast", "barrier")
        return self.numel if whole else self.numel // self.world_size

    @property
    def send_numel(self) -> int:
        """Elements of a rank's input."""
        return self.numel // self.world_size if self.op == "all_gather" else self.numel

    @property
    def recv_numel(self) -> int:
        """Elements of a rank's output."""
        return self.numel // self.world_size if self.op == "reduce_scatter" else self.numel


def bus_factor(op: str, world_size: int) -> float:
    """busbw / algbw."""
    match op:
        case "all_reduce":
            return 2 * (world_size - 1) / world_size
        case "all_gather" | "reduce_scatter" | "all_to_all":
            return (world_size - 1) / world_size
        case "broadcast":
            return 1.0
        case "barrier":
            return 0.0
    raise ValueError(f"unknown operation {op!r}; expected one of {', '.join(OPS)}")


def bandwidths_gb_s(op: str, nbytes: int, time_us: float, world_size: int) -> tuple[float, float]:
    """algbw and busbw, in 10^9 bytes a second."""
    algbw = nbytes / time_us / 1e3
    return algbw, algbw * bus_factor(op, world_size)


def bytes_moved(op: str, nbytes: int, world_size: int) -> int:
    """Bytes that all ranks together must read and write at least.

    Every input is read once and every output written once: inputs and outputs are private memory
    of the ranks, and no rank can do with less.
    """
    n = world_size
    match op:
        case "all_gather" | "reduce_scatter":  # one side is a shard, the other the whole
            return nbytes + n * nbytes
        case "all_reduce" | "all_to_all":
            return 2 * n * nbytes
        case "broadcast":
            return n * nbytes
        case "barrier":
            return 0
    raise ValueError(f"unknown operation {op!r}; expected one of {', '.join(OPS)}")


def sizes(
    first: int, last: int, *, factor: int | None, step: int | None, itemsize: int, world_size: int
) -> list[int]:
    """The sizes of a sweep in bytes, each rounded down to whole elements on every rank.

    Args:
        first: smallest size in bytes.
        last: largest size in bytes.
        factor: each size is the one before times this ...
        step: ... or plus this many bytes.
        itemsize: bytes of an element.
        world_size: ranks that share the array evenly.

    Raises:
        ValueError: the range is empty or the sizes do not grow.
    """
    if not 0 < first <= last:
        raise ValueError(f"-b and -e: expected 0 < begin <= end, got {first} and {last}")
    if (factor is None) == (step is None):
        raise ValueError("expected one of -f and -i")
    if (factor is not None and factor < 2) or (step is not None and step < 1):
        raise ValueError(f"expected -f >= 2 or -i >= 1, got -f {factor} -i {step}")
    grain = itemsize * world_size
    found: list[int] = []
    size = first
    while size <= last:
        rounded = max(grain, size // grain * grain)
        if rounded not in found:
            found.append(rounded)
        size = size * factor if factor is not None else size + (step or 0)
    return found
