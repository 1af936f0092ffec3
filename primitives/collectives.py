"""Collectives by the names of every supported torch, and of Python values, on any backend."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

# torch 2.13 renamed these two and warns about the old names; earlier ones have only those.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(full [n * numel], shard [numel], group=, async_op=): shards in rank order."""
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(shard [numel], full [n * numel], op=, group=, async_op=): sums over ranks in backend order."""


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
