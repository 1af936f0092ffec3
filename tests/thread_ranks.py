"""Ranks of one checkpoint as threads of this process, for tests that need many cheap ranks."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from primitives.checkpoint.exchange import Exchange

T = TypeVar("T")
TIMEOUT_S = 20


class ThreadExchange:
    """One thread's side of an exchange; items travel pickled, as between processes."""

    def __init__(self, rank: int, slots: list[bytes], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.world_size = len(slots)
        self._slots = slots
        self._barrier = barrier

    def all_gather(self, item: Any) -> list[Any]:
        self._slots[self.rank] = pickle.dumps(item)
        self._barrier.wait(TIMEOUT_S)
        items = [pickle.loads(slot) for slot in self._slots]
        self._barrier.wait(TIMEOUT_S)
        return items


def on_ranks(world_size: int, body: Callable[[Exchange], T]) -> list[T | Exception]:
    """Runs ``body`` on every rank; returns what each returned or raised."""
    barrier = threading.Barrier(world_size)
    slots = [b""] * world_size

    def run(rank: int) -> T | Exception:
        try:
            return body(ThreadExchange(rank, slots, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))
