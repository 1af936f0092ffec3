"""Inputs whose reductions are exact in every dtype and order, and how many results are wrong.

An element is a small integer that depends on rank and position, so that a block from the wrong
rank, a shifted one or a missing one is seen. Sums of up to 18 ranks fit int8 and are exact in
bfloat16.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from primitives.bench.case import Case, storage_dtype

Array = npt.NDArray[Any]
MAX_RANKS = 18


def _integers(case: Case, rank: int, start: int, numel: int) -> Array:
    """Elements [start, start + numel) of a rank's input, as small integers."""
    position = np.arange(start, start + numel, dtype=np.int64)
    value = (position + (position >> 7) + 3 * rank) % 8
    if case.reduce_op == "prod":
        value = 1 + (value & 1)
    return value.astype(np.int16)


def _encode(values: Array, dtype: str) -> Array:
    """Numbers as stored in ``dtype``; what is not exact is rounded once, from float32."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(storage_dtype(dtype))


def make_input(case: Case, rank: int) -> Array:
    """What a rank puts in, [case.send_numel], in the storage of case.dtype."""
    return _encode(_integers(case, rank, 0, case.send_numel), case.dtype)


def _reduced(case: Case, start: int, numel: int) -> Array:
    inputs = [_integers(case, r, start, numel).astype(np.int64) for r in range(case.world_size)]
    combine: dict[str, Callable[[list[Array]], Array]] = {
        "sum": np.add.reduce,
        "prod": np.multiply.reduce,
        "min": np.minimum.reduce,
        "max": np.maximum.reduce,
    }
    if case.reduce_op == "avg":
        return combine["sum"](inputs).astype(np.float32) / np.float32(case.world_size)
    return combine[case.reduce_op](inputs)


def expected_output(case: Case, rank: int) -> Array:
    """What a rank must get out, [case.recv_numel]."""
    n, part = case.world_size, case.numel // case.world_size
    match case.op:
        case "all_gather":
            values = np.concatenate([_integers(case, r, 0, part) for r in range(n)])
        case "all_to_all":
            values = np.concatenate([_integers(case, r, rank * part, part) for r in range(n)])
        case "broadcast":
            values = _integers(case, case.root, 0, case.numel)
        case "reduce_scatter":
            values = _reduced(case, rank * part, part)
        case "all_reduce":
            values = _reduced(case, 0, case.numel)
        case _:
            values = np.zeros(0, dtype=np.int16)
    return _encode(values, case.dtype)


def num_wrong(case: Case, rank: int, output: Array) -> int:
    """How many elements of ``output`` differ in their bits from what they must be."""
    expected = expected_output(case, rank)
    if output.size != expected.size:
        return max(output.size, expected.size)
    bits = np.dtype(f"u{expected.itemsize}")
    return int(np.count_nonzero(output.view(bits) != expected.view(bits)))
