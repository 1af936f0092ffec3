"""Forks, callbacks, and what runs out: nothing hangs, nothing dies, nobody is blamed wrongly."""

import resource
import time
from typing import Any

from ranks import ThreadRanks


def test_no_free_file_descriptor_is_not_a_dead_peer() -> None:
    ranks = ThreadRanks(2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def call(backend: Any, rank: int) -> None:
        if rank == 1:
            time.sleep(0.3)
        backend.barrier().wait()

    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        ranks(call)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    ranks.close()
