"""Leaves: whatever is summed or hashed over the whole model, one value per smallest piece.

A leaf is one slice of one canonical block of one parameter. Every rank computes the leaves of what
it holds; they are gathered, each counted once, and put in sorted order, so that no result knows how
many ranks held them. Several ranks may hold one leaf (a parameter that tp does not cut, the copies
of the tied table, replicas without ZeRO): the lowest of them speaks for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from primitives.layout import NUM_SLICES
from scenarios.parallel.mesh import RankGroup


class ReplicasDiffer(RuntimeError):
    """Two ranks hold different bits of what must be one parameter."""


@dataclass(frozen=True)
class LeafRun:
    """Consecutive leaves of one parameter on one rank: some blocks, of each the same slices."""

    name: str
    total_blocks: int
    """Of the whole parameter."""
    blocks: range
    slices: range

    def names(self) -> list[str]:
        """What the leaves are called in checkpoints and messages."""
        return [
            leaf_name(self.name, block, index) for block in self.blocks for index in self.slices
        ]


def leaf_name(name: str, block: int, index: int) -> str:
    """How a leaf is called in checkpoints and messages."""
    return f"{name}.block{block}.slice{index}"


class LeafTable:
    """Where the leaves of all ranks belong in the order (parameter, block, slice).

    Args:
        runs: what this rank holds, sorted by name; values are handed over in this order.
        world: all ranks.

    Raises:
        ValueError: a leaf is on no rank.

    Contract: collective over ``world``.
    """

    def __init__(self, runs: Sequence[LeafRun], world: RankGroup):
        self._world = world
        every: list[Sequence[LeafRun]] = [runs] * world.num_ranks
        if world.handle is not None:
            dist.all_gather_object(every, runs, group=world.handle)
        totals = {run.name: run.total_blocks for of_rank in every for run in of_rank}
        self.names = [
            name
            for parameter in sorted(totals)
            for name in LeafRun(
                parameter, totals[parameter], range(totals[parameter]), range(NUM_SLICES)
            ).names()
        ]
        place = {name: i for i, name in enumerate(self.names)}
        # Rank -> the place of each of its leaves.
        self._places = [
            torch.tensor([place[name] for run in of_rank for name in run.names()], dtype=torch.long)
            for of_rank in every
        ]
        self._owner = torch.full((len(self.names),), world.num_ranks)
        for rank in reversed(range(world.num_ranks)):
            self._owner[self._places[rank]] = rank
        if bool((self._owner == world.num_ranks).any()):
            missing = self.names[int((self._owner == world.num_ranks).nonzero()[0])]
            raise ValueError(f"{missing} is on no rank of {world.num_ranks}")
        self._num_padded = max(len(places) for places in self._places)
        self.owned = [bool(self._owner[place[run.names()[0]]] == world.rank) for run in runs]
        """Of each run whether this rank speaks for it."""

    def pad(self, leaves: Tensor) -> Tensor:
        """[leaves of this rank, ...] -> [rows that every rank has, ...]."""
        padded = leaves.new_zeros(self._num_padded, *leaves.shape[1:])
        padded[: len(leaves)] = leaves
        return padded

    def sort(self, gathered: Tensor) -> Tensor:
        """What ``pad`` gave on every rank, [ranks, rows, ...], -> [all leaves, ...] in order."""
        out = gathered.new_empty(len(self.names), *gathered.shape[2:])
        for rank in reversed(range(len(self._places))):
            places = self._places[rank]
            out[places] = gathered[rank, : len(places)]
        return out

    def check_replicas(self, gathered: Tensor, what: str) -> None:
        """Compares each leaf of every rank with its owner's.

        Args:
            gathered: digests as for ``sort``.
            what: is hashed, for the message.

        Raises:
            ReplicasDiffer: naming leaf and ranks.
        """
        ordered = self.sort(gathered)
        for rank, places in enumerate(self._places):
            mine = gathered[rank, : len(places)]
            wrong = (mine != ordered[places]).any(dim=1).nonzero().flatten()
            if len(wrong):
                place = int(places[wrong[0]])
                raise ReplicasDiffer(
                    f"{what} of {self.names[place]} differs between ranks "
                    f"{int(self._owner[place])} and {rank} ({len(wrong)} leaves of rank {rank} do)"
                )
