"""Faults on the process group: an error within 10 s on every rank, that says who and where.

Rank 0 starts a child job of four ranks for each fault, so the session itself stays whole. The
children's shared memory goes to a folder of their own, which must be empty afterwards.
"""

import multiprocessing as mp
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import primitives.backend
from primitives.env import SHM_DIR
from primitives.errors import CollectiveError, CollectiveMismatch, CollectiveTimeout, PeerLost

NUM_RANKS = 4
COLLECTIVE_TIMEOUT_S = 5.0
BOUND_S = 10.0
Fault = Callable[[int], None]


class Ending(NamedTuple):
    """How a child ended: the error it saw, or None; and how long after the fault."""

    error: Exception | None
    duration_s: float


def other_operation(rank: int) -> None:
    x = torch.ones(8)
    if rank == 2:
        dist.broadcast(x, src=0)
    else:
        dist.all_reduce(x)


def other_numel(rank: int) -> None:
    dist.all_reduce(torch.ones(9 if rank == 1 else 8))


def other_dtype(rank: int) -> None:
    dist.all_reduce(torch.ones(8, dtype=torch.float64 if rank == 3 else torch.float32))


def skipped_call(rank: int) -> None:
    if rank != 1:
        dist.all_reduce(torch.ones(8))
    else:
        time.sleep(COLLECTIVE_TIMEOUT_S + 2)


def raise_before_barrier(rank: int) -> None:
    if rank == 3:
        raise KeyError("lost the way")
    dist.barrier()


def killed_in_a_collective(rank: int) -> None:
    x = torch.ones(1 << 20)
    for turn in range(1_000_000):
        if rank == 2 and turn == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(x)


def live(fault: Fault, rank: int, port: int, shm_dir: str, report: Connection) -> None:
    """The life of one rank of a child job."""
    os.environ[SHM_DIR.name] = shm_dir
    primitives.backend.register()
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "primitives",
        store=store,
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    dist.barrier()
    start = time.monotonic()
    error = None
    try:
        fault(rank)
    except Exception as caught:
        error = caught
    report.send((error, time.monotonic() - start))


@pytest.fixture
def play(rank: int) -> Iterator[Callable[[Fault], list[Ending | None]]]:
    """Runs a fault on rank 0's children; the other ranks see an empty list."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "primitives.backend", __name__])
    children: list[Any] = []
    with tempfile.TemporaryDirectory(dir=SHM_DIR.get(), prefix="faults-") as shm_dir:

        def run(fault: Fault) -> list[Ending | None]:
            if rank != 0:
                return []
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            reports = []
            for r in range(NUM_RANKS):
                ours, theirs = context.Pipe(duplex=False)
                child = context.Process(target=live, args=(fault, r, store.port, shm_dir, theirs))
                child.start()
                theirs.close()
                children.append(child)
                reports.append(ours)
            endings: list[Ending | None] = []
            for report in reports:
                assert report.poll(60), f"rank {len(endings)} did not end"
                try:
                    endings.append(Ending(*report.recv()))
                except EOFError:  # killed
                    endings.append(None)
            for r, child in enumerate(children):
                child.join(BOUND_S)
                assert child.exitcode is not None, f"rank {r} does not exit after {fault.__name__}"
            assert list(Path(shm_dir).iterdir()) == []
            return endings

        try:
            yield run
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()


def check(
    endings: list[Ending | None], expected: type[CollectiveError], *texts: str, but: int = -1
) -> None:
    """Every rank except ``but`` saw the expected error in time, and it says all of ``texts``."""
    for rank, ending in enumerate(endings):
        if rank == but:
            continue
        assert ending is not None, f"rank {rank} died"
        assert type(ending.error) is expected, f"rank {rank}: {ending.error!r}"
        assert ending.duration_s < BOUND_S
        for text in texts:
            assert text in str(ending.error), f"rank {rank}: {ending.error}"


def test_another_operation_on_one_rank(play: Any) -> None:
    check(play(other_operation), CollectiveMismatch, "rank 2", "broadcast", "all_reduce")


def test_another_numel_on_one_rank(play: Any) -> None:
    check(play(other_numel), CollectiveMismatch, "rank 1", "all_reduce", "numel 9", "numel 8")


def test_another_dtype_on_one_rank(play: Any) -> None:
    check(play(other_dtype), CollectiveMismatch, "rank 3", "all_reduce", "float64", "float32")


def test_a_skipped_call(play: Any) -> None:
    check(play(skipped_call), CollectiveTimeout, "rank 1", "all_reduce", but=1)


def test_raise_before_barrier(play: Any) -> None:
    endings = play(raise_before_barrier)
    check(endings, PeerLost, "rank 3", "barrier", but=3)
    if endings:
        assert isinstance(endings[3].error, KeyError)


def test_sigkill_in_a_collective(play: Any) -> None:
    endings = play(killed_in_a_collective)
    check(endings, PeerLost, "rank 2", "all_reduce", but=2)
    if endings:
        assert endings[2] is None
