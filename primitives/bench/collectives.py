"""Collectives of the ``primitives`` backend beside gloo and the measured copy limit.

The ranks hold one process group of each backend and alternate between them, so that a slower moment
of the machine hits both. A figure is the median over rounds of the slowest rank.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import TCPStore

import primitives.backend
from primitives.collectives import all_gather_flat, reduce_scatter_flat

BACKENDS = ("primitives", "gloo")
NUM_ROUNDS = 7  # rounds of each backend, in turn
ROUND_S = 0.03  # about how long one round of one backend takes


@dataclass(frozen=True)
class Row:
    """One operation at one size; times are medians in microseconds."""

    op: str
    nbytes_per_rank: int
    time_us: dict[str, float]
    limit_us: float
    """Time in which the same ranks copy as many bytes as the operation must move."""


def bytes_moved(op: str, nbytes: int, world_size: int) -> int:
    """Bytes all ranks together must read and write at least, inputs and outputs in private memory.

    all_gather writes ``world_size`` blocks on each rank; reduce_scatter and all_reduce read every
    input once; all_reduce also writes the result on each rank.
    """
    match op:
        case "all_gather":
            return nbytes * world_size * (1 + world_size)
        case "reduce_scatter":
            return nbytes * world_size * (1 + world_size)
        case "all_reduce":
            return 2 * nbytes * world_size
        case "barrier":
            return 0
    raise ValueError(f"unknown operation {op!r}")


def call(op: str, nbytes: int, group: dist.ProcessGroup) -> Callable[[], object]:
    """The operation bound to buffers that were touched beforehand; nbytes is one rank's shard."""
    numel, world_size = nbytes // 4, group.size()
    shard = torch.ones(numel)
    full = torch.ones(numel * world_size)
    match op:
        case "all_gather":
            return lambda: all_gather_flat(full, shard, group=group)
        case "reduce_scatter":
            return lambda: reduce_scatter_flat(shard, full, group=group)
        case "all_reduce":
            return lambda: dist.all_reduce(shard, group=group)
        case "barrier":
            return lambda: dist.barrier(group=group)
    raise ValueError(f"unknown operation {op!r}")


def slowest_rank(function: Callable[[], object], num_calls: int) -> float:
    """Seconds a call takes on the slowest rank, all ranks starting together."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(num_calls):
        function()
    seconds = torch.tensor([(time.perf_counter() - start) / num_calls])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def copy_seconds(nbytes: int) -> float:
    """Median time in which all ranks, copying their own memory, read and write ``nbytes``."""
    numel = nbytes // (2 * 4 * dist.get_world_size())
    source, target = torch.ones(numel), torch.zeros(numel)
    num_calls = max(3, min(1000, (1 << 27) // max(nbytes, 1)))
    rounds = [slowest_rank(lambda: target.copy_(source), num_calls) for _ in range(NUM_ROUNDS)]
    return statistics.median(rounds)


def run_rank(
    rank: int, world_size: int, port: int, cases: list[tuple[str, int]], queue: "mp.Queue[Row]"
) -> None:
    torch.set_num_threads(1)
    primitives.backend.register()
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("primitives", store=store, rank=rank, world_size=world_size)
    groups = {name: dist.new_group(backend=name) for name in BACKENDS}
    for op, nbytes in cases:
        calls = {name: call(op, nbytes, groups[name]) for name in BACKENDS}
        warm_up = {name: slowest_rank(function, 3) for name, function in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in BACKENDS}
        for _ in range(NUM_ROUNDS):
            for name, function in calls.items():
                num_calls = max(1, min(1000, int(ROUND_S / warm_up[name])))
                samples[name].append(slowest_rank(function, num_calls))
        limit_s = copy_seconds(bytes_moved(op, nbytes, world_size))
        if rank == 0:
            time_us = {name: 1e6 * statistics.median(s) for name, s in samples.items()}
            queue.put(Row(op, nbytes, time_us, 1e6 * limit_s))
    dist.destroy_process_group()


def measure(world_size: int, cases: list[tuple[str, int]]) -> list[Row]:
    """Runs the cases on ``world_size`` fresh processes of this host, one thread each."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    queue: mp.Queue[Row] = context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(rank, world_size, store.port, cases, queue))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if failed := [rank for rank, process in enumerate(ranks) if process.exitcode != 0]:
        raise RuntimeError(f"benchmark ranks {failed} failed; see their messages above")
    return [queue.get() for _ in cases]
