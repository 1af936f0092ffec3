"""The ranks that share one axis of a mesh, and the collectives among them.

It lies here, below the code that calls it, so that errors name that code as the call's site.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from primitives.collectives import all_gather_flat, reduce_scatter_flat


class RankGroup:
    """The ranks along one axis of the mesh; a group of one rank communicates nothing.

    Args:
        ranks: global ranks, ascending.
        rank: this process's place among them.
        handle: their process group; None when this process is alone.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, handle: dist.ProcessGroup | None):
        self.ranks = ranks
        self.rank = rank
        self.handle = handle

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return len(self.ranks)

    def all_reduce(
        self, data: Tensor, op: Any = dist.ReduceOp.SUM, *, async_op: bool = False
    ) -> dist.Work | None:
        """In place, by the tree over ranks (or the maximum); ``data`` is contiguous."""
        if self.handle is None:
            return None
        work = dist.all_reduce(data, op=op, group=self.handle, async_op=async_op)
        return cast(dist.Work | None, work)

    def all_gather(self, shard: Tensor) -> Tensor:
        """[n, ...] -> [ranks * n, ...], the shards in rank order; ``shard`` itself when alone."""
        if self.handle is None:
            return shard
        shard = shard.contiguous()
        full = shard.new_empty(self.num_ranks * shard.shape[0], *shard.shape[1:])
        all_gather_flat(full.view(-1), shard.view(-1), group=self.handle)
        return full

    def all_gather_into(self, full: Tensor, shard: Tensor, *, async_op: bool) -> dist.Work | None:
        """[n] of every rank into ``full`` [ranks * n]; both flat and contiguous."""
        if self.handle is None:
            full.copy_(shard)
            return None
        return cast(
            dist.Work | None, all_gather_flat(full, shard, group=self.handle, async_op=async_op)
        )

    def all_gather_rows(self, rows: Tensor, num_rows: list[int]) -> Tensor:
        """[num_rows[rank], n] of every rank -> [sum of num_rows, n], in rank order."""
        if self.handle is None:
            return rows
        pieces = [rows.new_empty(num, rows.shape[1]) for num in num_rows]
        dist.all_gather(pieces, rows.contiguous(), group=self.handle)
        return torch.cat(pieces)

    def all_to_all_rows(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """[sum of sent, n] -> [sum of received, n]: a run of rows to each rank, one from each."""
        if self.handle is None:
            return rows
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.handle)
        return out

    def reduce_scatter(self, full: Tensor) -> Tensor:
        """[ranks * n, ...] -> [n, ...]: this rank's part of the tree over ranks."""
        if self.handle is None:
            return full
        full = full.contiguous()
        shard = full.new_empty(full.shape[0] // self.num_ranks, *full.shape[1:])
        reduce_scatter_flat(shard.view(-1), full.view(-1), group=self.handle)
        return shard

    def reduce_scatter_into(
        self, shard: Tensor, full: Tensor, *, async_op: bool
    ) -> dist.Work | None:
        """``full`` [ranks * n] summed by the tree over ranks into ``shard`` [n]; both flat."""
        if self.handle is None:
            shard.copy_(full)
            return None
        return cast(
            dist.Work | None, reduce_scatter_flat(shard, full, group=self.handle, async_op=async_op)
        )
