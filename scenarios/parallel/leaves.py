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
from primitives.rank_group import RankGroup


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
        every: what each rank holds; it hands over values in this order.
        rank: this one.

    Raises:
        ValueError: a leaf is on no rank.
    """

    def __init__(self, every: Sequence[Sequence[LeafRun]], rank: int):
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
        self._owner = torch.full((len(self.names),), -1)
        for holder in reversed(range(len(every))):
            self._owner[self._places[holder]] = holder
        missing = (self._owner < 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"{self.names[missing[0]]} is on none of {len(every)} ranks")
        self._num_padded = max(len(places) for places in self._places)
        self.owned = [bool(self._owner[place[run.names()[0]]] == rank) for run in every[rank]]
        """Of each of this rank's runs whether it speaks for it."""

    @classmethod
    def exchange(cls, runs: Sequence[LeafRun], world: RankGroup) -> "LeafTable":
        """The table of all ranks, of which this one holds ``runs``; collective over ``world``."""
        every = [runs]
        if world.handle is not None:
            every = [[]] * world.num_ranks
            dist.all_gather_object(every, runs, group=world.handle)
        return cls(every, world.rank)

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
