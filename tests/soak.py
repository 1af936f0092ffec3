"""Very many collectives and messages on real processes: every result right, and nothing grows.

    python tests/soak.py --operations 1000000 --ranks 8

After a warm-up of a tenth (3000 where that is at most a third), memory, descriptors, threads and
shared segments of every rank must stay what they are, while groups are created and destroyed along
the way.
"""

import argparse
import ctypes
import gc
import os
import random
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
from torch import Tensor

NUM_GENERATIONS = 50  # of sub-groups
SHORT, LONG = 64, 70_000  # elements
LONG_EVERY = 500
ALLOWED_GROWTH_KIB = 4 * 1024  # torch's and Python's own; a leak of 5 bytes a call is seen


LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Footprint:
    """What this process holds."""

    memory_kib: int  # private memory; the shared is in `segments`
    descriptors: int
    threads: int
    segments: int

    @staticmethod
    def measure() -> "Footprint":
        gc.collect()
        LIBC.malloc_trim(0)  # what malloc keeps of freed memory is no leak
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        maps = Path("/proc/self/maps").read_text()
        return Footprint(
            memory_kib=int(fields["RssAnon"].split()[0]),
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=int(fields["Threads"]),
            segments=maps.count("primitives-"),
        )

    def complaints(self, before: "Footprint") -> list[str]:
        """What grew since ``before``."""
        allowed = (ALLOWED_GROWTH_KIB, 0, 0, 0)
        names = ("KiB of memory", "descriptors", "threads", "segments")
        return [
            f"{name}: {old} -> {new}"
            for name, old, new, room in zip(
                names, astuple(before), astuple(self), allowed, strict=True
            )
            if new > old + room
        ]


class Program:
    """One rank's side; all ranks draw the same operations. Inputs are integers: sums are exact."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.random = random.Random(1)
        self.groups: list[Any] = []
        self.halves = [list(range(k, world_size, 2)) for k in range(2)]
        self.base = {n: torch.arange(n, dtype=torch.float32) % 97 for n in (SHORT, LONG)}

    def make_groups(self) -> None:
        """The sub-groups of the next generation."""
        self.groups = [dist.new_group(half) for half in self.halves]

    def leave_groups(self) -> None:
        for group in self.groups:
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
        self.groups = []

    def play(self, number: int) -> None:
        """Operation ``number``, verified."""
        n = LONG if number % LONG_EVERY == 0 else SHORT
        shift, kind = self.random.randrange(100), self.random.randrange(8)
        group, members, me = None, list(range(self.world_size)), self.rank
        if self.random.random() < 0.3:
            half = self.rank % 2
            group, members, me = self.groups[half], self.halves[half], self.rank // 2
        size = len(members)
        base = self.base[n]
        x = base + (shift + me)
        total = base * size + (shift * size + size * (size - 1) // 2)
        if kind == 0:
            dist.all_reduce(x, group=group)
            self.check(number, x, total)
        elif kind == 1:
            work: Any = dist.all_reduce(x, group=group, async_op=True)
            work.wait()
            self.check(number, x, total)
        elif kind == 2:
            outs = [torch.empty_like(x) for _ in members]
            dist.all_gather(outs, x, group=group)
            for r, out in enumerate(outs):
                self.check(number, out, base + (shift + r))
        elif kind == 3:
            out = torch.empty_like(x)
            dist.reduce_scatter(out, [x + r for r in range(size)], group=group)
            self.check(number, out, total + me * size)
        elif kind == 4:
            out = torch.empty(size)
            dist.all_to_all_single(out, x[0] + torch.arange(float(size)), group=group)
            self.check(number, out, base[0] + shift + torch.arange(float(size)) + me)
        elif kind == 5:
            dist.broadcast(x, src=members[shift % size], group=group)
            self.check(number, x, base + (shift + shift % size))
        elif kind == 6:
            out, before = torch.empty_like(x), (me - 1) % size
            sent: Any = dist.isend(x, members[(me + 1) % size], group=group, tag=shift)
            dist.recv(out, members[before], group=group, tag=shift)
            sent.wait()
            self.check(number, out, base + (shift + before))
        else:
            dist.barrier(group=group)

    def check(self, number: int, got: Tensor, want: Tensor) -> None:
        if not torch.equal(got, want):
            raise AssertionError(f"operation {number} on rank {self.rank}: {got}, not {want}")


def worker(num_operations: str) -> None:
    """One rank; rank 0 prints what it did."""
    rank, world_size = ranks.init(timeout_s=120)
    total = int(num_operations)
    program = Program(rank, world_size)
    generation = max(1, total // NUM_GENERATIONS)
    warm_up = max(total // 10, min(3000, total // 3))
    warm = None
    start = time.monotonic()
    for number in range(total):
        if number % generation == 0:
            program.leave_groups()  # what a rank holds is measured without them
            if number >= warm_up and warm is None:
                warm = Footprint.measure()
            if rank == 0 and number:
                rate = number / (time.monotonic() - start)
                print(f"{number} operations, {rate:.0f}/s, {Footprint.measure()}", flush=True)
            program.make_groups()
        program.play(number)
    seconds = time.monotonic() - start
    program.leave_groups()
    after = Footprint.measure()
    assert warm is not None
    complaints = after.complaints(warm)
    dist.destroy_process_group()
    if rank == 0:
        print(f"{total} operations on {world_size} ranks in {seconds:.0f} s: {warm} -> {after}")
    if complaints:
        raise SystemExit(f"rank {rank} grew: {'; '.join(complaints)}")


def soak(num_operations: int, num_ranks: int, folder: Path, timeout_s: float) -> list[str]:
    """Runs the ranks; their outputs.

    Raises:
        AssertionError: a rank failed or grew, or shared memory was left behind.
    """
    # One arena: which thread happened to allocate must not look like growth.
    env = {"MALLOC_ARENA_MAX": "1"}
    arguments = (str(num_operations),)
    started = ranks.ProcessRanks("soak:worker", num_ranks, folder, arguments, env, fresh=True)
    results = started.start().wait(timeout_s)
    for rank, (code, output) in enumerate(results):
        assert code == 0, f"rank {rank} ended with {code}:\n{output}"
    assert not started.leftovers(), started.leftovers()
    return [output for _, output in results]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--timeout-s", type=float, default=3600)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outputs = soak(arguments.operations, arguments.ranks, Path(scratch), arguments.timeout_s)
    print(outputs[0], end="")
