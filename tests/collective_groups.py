"""Groups of thread ranks, one per world size, that play cases and count them."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from collective_cases import Case
from ranks import ThreadRanks


class Groups:
    """Plays a case on the group of its world size; a group that failed is replaced."""

    def __init__(self) -> None:
        self._groups: dict[int, ThreadRanks] = {}
        self.played: Counter[str] = Counter()

    def of(self, world_size: int) -> ThreadRanks:
        if world_size not in self._groups:
            self._groups[world_size] = ThreadRanks(world_size)
        return self._groups[world_size]

    def play(self, name: str, case: Case, call: Callable[[Any, int], Any]) -> list[Any]:
        """``call(backend, rank)`` on every rank, late and placed as the case says."""
        cpus = sorted(os.sched_getaffinity(0))

        def on_rank(backend: Any, rank: int) -> Any:
            if case.placement is not None:
                os.sched_setaffinity(0, {cpus[(case.placement + rank) % len(cpus)]})
            time.sleep(case.delays_us[rank] / 1e6)
            return call(backend, rank)

        try:
            results = self.of(case.world_size)(on_rank)
        except BaseException:
            self.drop(case.world_size)
            raise
        self.played[name] += 1
        return results

    def drop(self, world_size: int) -> None:
        """Ends a group whose ranks may not be in step any more."""
        group = self._groups.pop(world_size)
        for backend in group.backends:
            backend.abort()
        group.close()

    def close(self) -> None:
        for group in self._groups.values():
            group.close()

    def report(self) -> None:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.played.items()))
        print(f"\n{self.played.total()} cases played: {counts}", file=sys.__stderr__)
