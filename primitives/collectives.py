"""Fused collectives on lists of tensors; collectives of Python values, on any backend.

The fused ones replace FSDP's and ZeRO's flat buffer, cast, collective and copies by one pass over
the tensors. ``fulls[i]`` is a full tensor, ``shards[i]`` this rank's part of it. How it is cut:

* by default as FSDP2 does: along dimension 0 in chunks of ceil(rows / world_size) rows, the last
  ones shorter or empty. Padding is neither sent nor expected; who wants it pads both sides;
* or by ``numels[i]``: how many elements of the flattened tensor each rank holds, in rank order.

All tensors are contiguous, on the CPU or on one CUDA device, and on one side all of one dtype.
Where the full tensors of all ranks lie in symmetric memory (``primitives.empty``) they are written
or read in place; on CUDA the inputs are read in place when all of them lie there. On CUDA a call
is one kernel on the current stream, which may be captured in a graph; with ``async_op`` the Work
lets the stream of its ``wait()`` wait.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from primitives.backend import native

# torch 2.13 renamed these two and warns about the old names; earlier ones have only those.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(full [n * numel], shard [numel], group=, async_op=): shards in rank order."""
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(shard [numel], full [n * numel], op=, group=, async_op=): sums over ranks in backend order."""


def all_gather(
    shards: Sequence[Tensor],
    fulls: Sequence[Tensor],
    *,
    numels: Sequence[Sequence[int]] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Gathers many sharded tensors at once: ``fulls[i]`` gets every rank's ``shards[i]``, cast.

    Args:
        shards: this rank's parts; any dtype.
        fulls: outputs, of that dtype, or float32, float16 and bfloat16 in any combination. A shard
            of equal dtype may be this rank's part of its full tensor.
        numels: see above.
        group: of the "primitives" backend. Default: the world.
        async_op: return a Work, and leave all tensors alone until it is done.

    Raises:
        ValueError: a tensor does not fit, is not contiguous, or an output overlaps another tensor.
        CollectiveMismatch: the ranks' lists differ in sizes, dtypes or cut.

    Numerics: each element is rounded once, to nearest, ties to even, subnormals kept: the bits of
        ``shard.to(dtype)`` (any NaN of bfloat16 becomes 0x7fc0).
    """
    work = native(group, "all_gather").all_gather_many(shards, fulls, _flat(numels), async_op)
    return work if async_op else None


def reduce_scatter(
    fulls: Sequence[Tensor],
    shards: Sequence[Tensor],
    *,
    factor: float = 1.0,
    accumulate: bool = False,
    squares: Tensor | None = None,
    numels: Sequence[Sequence[int]] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Sums many full tensors over the ranks at once: ``shards[i]`` gets this rank's part, scaled.

    shard = (shard if accumulate else 0) + factor * (full of rank 0 + full of rank 1 + ...)

    Args:
        fulls: inputs (gradients); float32, float16 or bfloat16.
        shards: outputs; float32.
        factor: such as 1 / world_size; the same on every rank.
        accumulate: add to what the shards hold.
        squares: float32 [len(fulls)], receives the sum of squares of each shard as it is then. For
            the norm over all, add these over tensors and ranks.
        numels: see above.
        group: of the "primitives" backend. Default: the world.
        async_op: return a Work, and leave all tensors alone until it is done.

    Raises:
        ValueError: a tensor does not fit, is not contiguous, or an output overlaps another tensor.
        CollectiveMismatch: the ranks' lists differ in sizes, dtypes, cut, factor or accumulate.

    Numerics: inputs are widened to float32 and added along the tree over ranks
        (``primitives.reference.tree``); the sum is multiplied by float32(factor), then added to the
        shard: one rounding each. Sums of squares are ``canonical.sum_of_squares`` of the flattened
        shard: rounded products, added along the adjacent-pair tree over its elements. No order
        depends on the other tensors, on chunks, or on where the memory lies.
    """
    work = native(group, "reduce_scatter").reduce_scatter_many(
        fulls, shards, _flat(numels), factor, accumulate, squares, async_op
    )
    return work if async_op else None


def _flat(numels: Sequence[Sequence[int]] | None) -> list[int]:
    return [numel for of_tensor in numels or () for numel in of_tensor]


def all_gather_dict(
    values: Mapping[str, Any], group: dist.ProcessGroup | None = None
) -> dict[str, list[Any]]:
    """Gathers a dict of lists, scalars or other picklable values from every rank.

    Args:
        values: the same keys on every rank, in any order; the values may differ in every respect.
        group: default: the world.

    Returns:
        For each key, in this rank's order, the values by group rank.

    Raises:
        ValueError: the keys differ; raised on every rank alike, naming the ranks and keys.
    """
    by_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_rank, dict(values), group=group)
    check_same_keys("all_gather_dict", [list(theirs) for theirs in by_rank])
    return {key: [theirs[key] for theirs in by_rank] for key in values}


def check_same_keys(operation: str, keys_by_rank: list[list[Any]]) -> None:
    """Raises ValueError, naming rank and key, unless every rank has the keys of rank 0."""
    expected = set(keys_by_rank[0])
    complaints = []
    for rank, keys in enumerate(keys_by_rank):
        if missing := sorted(map(str, expected - set(keys))):
            complaints.append(f"rank {rank} lacks {', '.join(missing)}")
        if extra := sorted(map(str, set(keys) - expected)):
            complaints.append(f"rank {rank} also has {', '.join(extra)}")
    if complaints:
        raise ValueError(
            f"{operation}: every rank must have the keys of group rank 0 "
            f"({', '.join(sorted(map(str, expected)))}): {'; '.join(complaints)}"
        )
