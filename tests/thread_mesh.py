"""A mesh whose ranks are threads of this process, for layers that communicate inside a step."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from primitives.rank_group import RankGroup
from scenarios.layout import Layout
from scenarios.parallel.mesh import AXES, Mesh, groups_along
from tests.ranks import run_threads

T = TypeVar("T")
TIMEOUT_S = 20.0


class ThreadGroup(RankGroup):
    """One thread's side of a group."""

    def __init__(self, ranks: tuple[int, ...], rank: int, shared: "Shared"):
        super().__init__(ranks, rank, None)
        self._shared = shared

    def _swap(self, value: list[Tensor]) -> list[list[Tensor]]:
        """What every rank brought."""
        self._shared.slots[self.rank] = value
        self._shared.barrier.wait(TIMEOUT_S)
        values = list(self._shared.slots)
        self._shared.barrier.wait(TIMEOUT_S)
        return values

    def all_gather(self, shard: Tensor) -> Tensor:
        return torch.cat([value for (value,) in self._swap([shard])])

    def all_gather_rows(self, rows: Tensor, num_rows: list[int]) -> Tensor:
        pieces = [value for (value,) in self._swap([rows])]
        assert [len(piece) for piece in pieces] == num_rows
        return torch.cat(pieces)

    def all_to_all_rows(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        pieces = [value[self.rank] for value in self._swap(list(rows.split(sent)))]
        assert [len(piece) for piece in pieces] == received
        return torch.cat(pieces)


class Shared:
    """Where the threads of one group meet."""

    def __init__(self, num_ranks: int):
        self.slots: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        self.barrier = threading.Barrier(num_ranks)


def on_mesh(layout: Layout, body: Callable[[Mesh], T]) -> list[T]:
    """``body(mesh)`` on every rank at once; the results in rank order."""
    groups = {axis: groups_along(layout, axis) for axis in AXES}
    shared = {(axis, g): Shared(len(g)) for axis, gs in groups.items() for g in gs}

    def run(rank: int) -> T:
        mesh = Mesh(layout, rank, {})
        for axis, gs in groups.items():
            (ranks,) = (g for g in gs if rank in g)
            setattr(mesh, axis, ThreadGroup(ranks, ranks.index(rank), shared[axis, ranks]))
        return body(mesh)

    return run_threads(layout.world_size, run)
