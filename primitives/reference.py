"""What each collective means, in plain torch on one process: what the transport is tested against.

Every function takes the inputs of all ranks (``xs[r]`` is rank r's) and returns the outputs of all
ranks. Reductions run along the adjacent-pair tree over ranks, an odd last one carried up:
((x0 + x1) + (x2 + x3)) + x4.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def tree(xs: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine adjacent pairs, level by level, until one is left."""
    level = list(xs)
    while len(level) > 1:
        pairs = [combine(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) // 2 * 2 :]
    return level[0]


def _min(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(torch.isnan(a) | (a < b), a, b)


def _max(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(torch.isnan(a) | (a > b), a, b)


COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "premul_sum": torch.add,
    "product": torch.mul,
    "min": _min,
    "max": _max,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
COMBINE_BOOL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.logical_or,
    "max": torch.logical_or,
    "bor": torch.logical_or,
    "product": torch.logical_and,
    "min": torch.logical_and,
    "band": torch.logical_and,
    "bxor": torch.logical_xor,
}


def reduce(xs: Sequence[Tensor], op: str = "sum", factor: float = 1.0) -> Tensor:
    """The tree over ranks.

    Args:
        xs: one tensor per rank, equal shapes and dtypes.
        op: a key of COMBINE.
        factor: what premul_sum multiplies every input with.

    Numerics: float16 and bfloat16 are combined in float32 and rounded once at the end; avg divides
        the sum by the number of ranks before that rounding.
    """
    dtype = xs[0].dtype
    if dtype == torch.bool:
        return tree(xs, COMBINE_BOOL[op])
    half = dtype in (torch.float16, torch.bfloat16)
    wide = [x.float() if half else x for x in xs]
    if op == "premul_sum":
        wide = [x * torch.tensor(factor, dtype=x.dtype) for x in wide]
    result = tree(wide, COMBINE[op])
    if op == "avg":
        # A complex quotient has its own rounding; the mean divides real and imaginary parts.
        parts = torch.view_as_real(result) if dtype.is_complex else result
        parts /= len(xs)
    return result.to(dtype)


def all_reduce(xs: Sequence[Tensor], op: str = "sum", factor: float = 1.0) -> list[Tensor]:
    """Every rank gets the tree over ranks."""
    return [reduce(xs, op, factor)] * len(xs)


def reduce_scatter(xs: Sequence[Sequence[Tensor]], op: str = "sum") -> list[Tensor]:
    """Rank r gets the tree over ranks of their r-th part; ``xs[s][r]`` is rank s's part for r."""
    return [reduce([parts[r] for parts in xs], op) for r in range(len(xs))]


def all_gather(xs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Every rank gets every rank's tensor."""
    return [list(xs)] * len(xs)


def all_to_all(xs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Rank r gets the r-th part of every rank."""
    return [[parts[r] for parts in xs] for r in range(len(xs))]


def broadcast(xs: Sequence[Tensor], root: int) -> list[Tensor]:
    """Every rank gets the root's tensor."""
    return [xs[root]] * len(xs)
