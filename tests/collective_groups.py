"""Groups of thread ranks, one per world size and staging, that play cases and count them."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from collective_cases import Case
from ranks import ThreadRanks


class Groups:
    """Plays a case on the group it needs; a group that failed is replaced."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, str], ThreadRanks] = {}
        self.played: Counter[str] = Counter()

    def of(self, world_size: int, staging: str = "auto") -> ThreadRanks:
        if (world_size, staging) not in self._groups:
            self._groups[world_size, staging] = ThreadRanks(world_size, staging=staging)
        return self._groups[world_size, staging]

    def play(self, name: str, case: Case, call: Callable[[Any, int], Any]) -> list[Any]:
        """``call(backend, rank)`` on every rank, late and placed as the case says."""
        cpus = sorted(os.sched_getaffinity(0))

        def on_rank(backend: Any, rank: int) -> Any:
            if case.placement is not None:
                os.sched_setaffinity(0, {cpus[(case.placement + rank) % len(cpus)]})
            time.sleep(case.delays_us[rank] / 1e6)
            return call(backend, rank)

        try:
            results = self.of(case.world_size, case.staging)(on_rank)
        except BaseException:
            self.drop(case.world_size, case.staging)
            raise
        self.played[name] += 1
        return results

    def drop(self, world_size: int, staging: str) -> None:
        """Ends a group whose ranks may not be in step any more."""
        group = self._groups.pop((world_size, staging))
        for backend in group.backends:
            backend.abort()
        group.close()

    def close(self) -> None:
        for group in self._groups.values():
            group.close()

    def report(self) -> None:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.played.items()))
        print(f"\n{self.played.total()} cases played: {counts}", file=sys.__stderr__)
