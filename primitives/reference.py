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
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
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
        op: a key of COMBINE; complex tensors have sum, avg and premul_sum.
        factor: what premul_sum multiplies every input with.

    Numerics: float16 and bfloat16 are combined in float32 and rounded once at the end; avg divides
        the sum by the number of ranks before that rounding.
    """
    dtype = xs[0].dtype
    if dtype == torch.bool:
        return tree(xs, COMBINE_BOOL[op])
    if dtype.is_complex:  # real and imaginary parts on their own
        parts = [torch.view_as_real(x.resolve_conj()) for x in xs]
        return torch.view_as_complex(reduce(parts, op, factor))
    if dtype in SIGNED:  # torch lacks most operations on them; the bits are those of the signed sum
        signed = SIGNED[dtype]
        # min and max: with the sign bit flipped the order is that of the signed numbers
        flip = torch.iinfo(signed).min if op in ("min", "max") else 0
        result = reduce([torch.bitwise_xor(x.view(signed), flip) for x in xs], op)
        return torch.bitwise_xor(result, flip).view(dtype)
    half = dtype in (torch.float16, torch.bfloat16)
    wide = [x.float() if half else x for x in xs]
    if op == "premul_sum":
        wide = [x * torch.tensor(factor, dtype=x.dtype) for x in wide]
    result = tree(wide, COMBINE[op])
    if op == "avg":
        result = result / len(xs)
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
