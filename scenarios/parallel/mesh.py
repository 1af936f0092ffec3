"""The ranks of a layout as a mesh, and the group of ranks along each of its axes.

[Note: rank order] As in Megatron-LM's default order "tp-cp-ep-dp-pp": tp is the fastest axis, then
dp, then pp. The experts of one pipeline stage see its tp * dp ranks as another mesh: etp fastest,
then ep, then expert_dp. Neighbours in a group are in ascending order, so the tree over the ranks of
tp (or dp) continues the trees over the parts (or microbatches) that each rank holds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from primitives.rank_group import RankGroup
from scenarios.layout import Layout

__all__ = ["AXES", "Mesh", "RankGroup", "Stage", "groups_along"]


@dataclass(frozen=True)
class Stage:
    """One of the pipeline's stages."""

    index: int = 0
    num_stages: int = 1

    @property
    def is_first(self) -> bool:
        """It holds the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """It holds the head and the loss."""
        return self.index == self.num_stages - 1

    def layers(self, num_layers: int) -> range:
        """The layers of this stage: contiguous, equally many in every stage."""
        return range(
            self.index * num_layers // self.num_stages,
            (self.index + 1) * num_layers // self.num_stages,
        )


@dataclass(frozen=True)
class _Coordinates:
    """Where a rank is, in the mesh and in its stage's mesh of experts."""

    tp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int

    @classmethod
    def of(cls, layout: Layout, rank: int) -> "_Coordinates":
        in_stage = rank % (layout.tp * layout.dp)
        return cls(
            tp=rank % layout.tp,
            dp=in_stage // layout.tp,
            pp=rank // (layout.tp * layout.dp),
            etp=in_stage % layout.etp,
            ep=in_stage // layout.etp % layout.ep,
            expert_dp=in_stage // (layout.etp * layout.ep),
        )


def _embedding_key(layout: Layout, at: _Coordinates) -> tuple[int, ...]:
    """First and last stage belong together; the ranks between them are alone."""
    in_middle = 0 < at.pp < layout.pp - 1
    return (at.tp, at.dp, at.pp if in_middle else 0)


# Axis -> what the ranks of one group along it have in common.
AXES: dict[str, Callable[[Layout, _Coordinates], tuple[int, ...]]] = {
    "world": lambda layout, at: (),
    "tp": lambda layout, at: (at.dp, at.pp),
    "dp": lambda layout, at: (at.tp, at.pp),
    "pp": lambda layout, at: (at.tp, at.dp),
    "embedding": _embedding_key,
    "etp": lambda layout, at: (at.ep, at.expert_dp, at.pp),
    "ep": lambda layout, at: (at.etp, at.expert_dp, at.pp),
    "expert_dp": lambda layout, at: (at.etp, at.ep, at.pp),
}


def groups_along(layout: Layout, axis: str) -> list[tuple[int, ...]]:
    """All groups along one axis: a partition of the layout's ranks, each group ascending."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        key = AXES[axis](layout, _Coordinates.of(layout, rank))
        groups.setdefault(key, []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


class Mesh:
    """This rank's groups in a layout.

    Args:
        layout: parallel degrees; ``sp`` only matters with tp > 1.
        rank: this process.
        handles: process group of every set of ranks that has more than one.

    Contract: use ``connect``, or ``Mesh.alone()`` for a single process without torch.distributed.
    """

    def __init__(
        self, layout: Layout, rank: int, handles: dict[tuple[int, ...], dist.ProcessGroup]
    ):
        self.layout = layout
        self.rank = rank

        def group(axis: str) -> RankGroup:
            (ranks,) = (ranks for ranks in groups_along(layout, axis) if rank in ranks)
            return RankGroup(ranks, ranks.index(rank), handles.get(ranks))

        self.world = group("world")
        self.tp = group("tp")
        self.dp = group("dp")
        self.pp = group("pp")
        self.embedding = group("embedding")
        self.etp = group("etp")
        self.ep = group("ep")
        self.expert_dp = group("expert_dp")
        self.stage = Stage(self.pp.rank, self.pp.num_ranks)
        self.sp = layout.sp

    @classmethod
    def alone(cls) -> "Mesh":
        """One rank that communicates with nobody."""
        return cls(Layout.build(), 0, {})

    @classmethod
    def connect(cls, layout: Layout) -> "Mesh":
        """The mesh over the default process group; collective over all its ranks.

        Raises:
            ValueError: the layout needs another number of ranks.
        """
        num_ranks = dist.get_world_size()
        if layout.world_size != num_ranks:
            raise ValueError(
                f"layout {layout} needs {layout.world_size} ranks; "
                f"the process group has {num_ranks}"
            )
        handles: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for axis in AXES:
            for ranks in groups_along(layout, axis):
                if len(ranks) == 1 or ranks in handles:
                    continue
                if len(ranks) == num_ranks:
                    handles[ranks] = dist.distributed_c10d._get_default_group()
                else:
                    # Every rank of the job makes every group, in this order.
                    handles[ranks] = dist.new_group(list(ranks))
        return cls(layout, dist.get_rank(), handles)

    def loss_ranks(self) -> list[int]:
        """One rank of the last stage for each replica, in their order: they know the losses."""
        layout = self.layout
        per_stage = layout.tp * layout.dp
        return list(range((layout.pp - 1) * per_stage, layout.pp * per_stage, layout.tp))

    def replicas(self, expert: bool) -> RankGroup:
        """The ranks that hold the same part of an expert's, or of any other, parameter."""
        return self.expert_dp if expert else self.dp

    def token_slice(self, num_tokens: int) -> slice:
        """The tokens of this rank outside the tp parts: a run of them with sp, else all.

        Args:
            num_tokens: of the whole microbatch.
        """
        if not self.sp:
            return slice(0, num_tokens)
        per_rank = num_tokens // self.tp.num_ranks
        return slice(self.tp.rank * per_rank, (self.tp.rank + 1) * per_rank)

    def gather_tokens(self, x: Tensor) -> Tensor:
        """[local tokens, ...] -> [tokens, ...]."""
        return self.tp.all_gather(x) if self.sp else x

    def sum_over_tp(self, partial: Tensor) -> Tensor:
        """The upper levels of a tree over parts, whose lower ones each tp rank has done.

        Args:
            partial: [tokens, n] fp32; another dtype only where at most one rank's is not zero.

        Returns:
            [local tokens, n]: this rank's token slice with sp, else all tokens; ``partial`` may
            have been overwritten.
        """
        if self.sp:
            return self.tp.reduce_scatter(partial)
        self.tp.all_reduce(partial)
        return partial
