"""Fresh processes of this host that measure together."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import TCPStore

import primitives.backend

Result = TypeVar("Result")


def run_ranks(main: Callable[[], Result], num_ranks: int, timeout: timedelta) -> Result:
    """Runs ``main`` as every rank of a group of the primitives backend, one thread each.

    Returns:
        What rank 0 returned.

    Raises:
        RuntimeError: a rank failed; its message is on stderr.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    results: mp.Queue[Result] = context.Queue()
    ranks = [
        context.Process(target=_run, args=(main, rank, num_ranks, store.port, timeout, results))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if failed := [rank for rank, process in enumerate(ranks) if process.exitcode != 0]:
        raise RuntimeError(f"benchmark ranks {failed} failed; see their messages above")
    return results.get()


def _run(
    main: Callable[[], Result],
    rank: int,
    num_ranks: int,
    port: int,
    timeout: timedelta,
    results: "mp.Queue[Result]",
) -> None:
    torch.set_num_threads(1)
    primitives.backend.register()
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "primitives", store=store, rank=rank, world_size=num_ranks, timeout=timeout
    )
    result = main()
    if rank == 0:
        results.put(result)
    dist.destroy_process_group()
