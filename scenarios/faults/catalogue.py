"""The faults, by the numbers of the project's list, each as what one rank's process does.

A body runs on every rank of a job of ``NUM_RANKS`` after one barrier, so its first collective of
the world has number 2; waits end after ``TIMEOUT_S``.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from primitives.collectives import all_gather_flat
from primitives.env import CHECK
from primitives.errors import CollectiveError
from scenarios.faults.flip import flip_in_segments

NUM_RANKS = 4
TIMEOUT_S = 2.0
TIMEOUT = timedelta(seconds=TIMEOUT_S)
LOST, LATE, MISMATCH = "PeerLost", "CollectiveTimeout", "CollectiveMismatch"


def nothing(shm_dir: Path) -> None:
    """The folder for shared memory stays as it is."""


@dataclass(frozen=True)
class Fault:
    """One fault and the ending that it must have."""

    id: str
    what: str
    body: Callable[[int], None]
    error: str | tuple[str, ...]
    """What every rank but the victims must end with: names of errors, or ``returned``."""
    words: tuple[str, ...] = ()
    """Must stand in each of these errors."""
    victims: Mapping[int, str] = field(default_factory=dict)
    """Ending of the ranks that do the fault; ``any`` if it does not matter."""
    env: Mapping[str, str] = field(default_factory=dict)
    joins: bool = True
    """The ranks share the world already when the body starts."""
    num_jobs: int = 1
    prepare: Callable[[Path], None] = nothing
    shm_size: str = ""
    """The shared memory is a file system of its own, of this size as mount takes it."""


def other_operation(rank: int) -> None:
    x = torch.ones(8)
    if rank == 2:
        dist.broadcast(x, src=0)
    else:
        dist.all_reduce(x)


def other_root(rank: int) -> None:
    dist.broadcast(torch.ones(8), src=1 if rank == 3 else 0)


def other_reduce_op(rank: int) -> None:
    dist.all_reduce(torch.ones(8), dist.ReduceOp.MAX if rank == 1 else dist.ReduceOp.SUM)


def other_numel(rank: int) -> None:
    dist.all_reduce(torch.ones(9 if rank == 1 else 8))


def other_dtype(rank: int) -> None:
    dist.all_reduce(torch.ones(8, dtype=torch.float64 if rank == 3 else torch.float32))


def other_message(rank: int) -> None:
    if rank == 0:
        dist.send(torch.ones(3), 1)
    if rank == 1:
        dist.recv(torch.ones(2), 0)
    dist.barrier()


def swapped_order(rank: int) -> None:
    calls = [
        lambda: dist.all_reduce(torch.ones(8)),
        lambda: all_gather_flat(torch.ones(32), torch.ones(8)),
    ]
    for call in reversed(calls) if rank == 1 else calls:
        call()


def crossed_groups(rank: int) -> None:
    groups = [dist.new_group(timeout=TIMEOUT) for _ in range(2)]
    try:
        for group in groups if rank < 2 else reversed(groups):
            dist.all_reduce(torch.ones(8), group=group)
    except CollectiveError:
        time.sleep(1)  # both groups shall run into their deadlines before anybody leaves
        raise


def subgroups_in_another_order(rank: int) -> None:
    groups = [[0, 1], [0, 2]]
    if rank == 1:
        time.sleep(0.5)  # so that rank 2 is taken for rank 1 of the first group
    for members in reversed(groups) if rank == 2 else groups:
        dist.new_group(members, TIMEOUT)


def subgroup_with_other_members(rank: int) -> None:
    dist.new_group([0, 1, 2] if rank < 2 else [0, 2, 3], TIMEOUT)


def skipped_call(rank: int) -> None:
    if rank != 1:
        dist.all_reduce(torch.ones(8))
    else:
        time.sleep(TIMEOUT_S + 1)


def raise_before_barrier(rank: int) -> None:
    if rank == 3:
        raise KeyError("lost the way")
    dist.barrier()


def in_the_middle(strike: Callable[[], object]) -> Callable[[int], None]:
    """Rank 2 strikes while the others and it pass large all_reduces."""

    def body(rank: int) -> None:
        x = torch.ones(1 << 18)
        for turn in range(1_000_000):
            if rank == 2 and turn == 5:
                strike()
            dist.all_reduce(x)

    return body


def signal_in_a_wait(number: int) -> Callable[[int], None]:
    """Rank 2 gets the signal while it waits in a collective for rank 1."""

    def body(rank: int) -> None:
        if rank == 1:
            time.sleep(1)
        if rank == 2:
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        dist.all_reduce(torch.ones(1 << 18))  # several chunks: its part is needed again and again

    return body


def hold_the_gil(rank: int) -> None:
    if rank == 1:
        ctypes.PyDLL(None).sleep(int(TIMEOUT_S) + 1)
    dist.all_reduce(torch.ones(8))


def die_while_joining(rank: int) -> None:
    if rank == 2:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if rank == 3:
        time.sleep(3 * TIMEOUT_S)  # comes when all is over
    else:
        _init(60.0)


def never_join(rank: int) -> None:
    if rank != 3:
        _init(TIMEOUT_S)


def many_sums(rank: int) -> None:
    for turn in range(100):
        x = torch.full((1000,), float(rank + turn))
        dist.all_reduce(x)
        expected = NUM_RANKS * turn + sum(range(NUM_RANKS))
        if not torch.all(x == expected):
            raise ArithmeticError(f"turn {turn}: expected {expected}, got {x}")


def out_of_memory(rank: int) -> None:
    if rank == 2:
        torch.empty(1 << 50)
    dist.all_reduce(torch.ones(8))


def flipped_bit(rank: int) -> None:
    shard = torch.full((100,), 1.25 + rank)
    if rank == 0:
        time.sleep(0.6)
    if rank == 1:  # while it waits for rank 0, with its shard staged
        threading.Timer(0.3, flip_in_segments, (bytes(shard.numpy()),)).start()
    all_gather_flat(torch.empty(400), shard)
    dist.barrier()


def join(rank: int) -> None:
    _init(TIMEOUT_S)
    many_sums(rank)


def _init(timeout_s: float) -> None:
    from scenarios.faults.play import join_world

    join_world(timeout_s)


def leave_a_segment(shm_dir: Path) -> None:
    """As a process does that is killed before all have mapped it; no such pid can exist."""
    (shm_dir / f"primitives-{os.getuid()}-{2**22 + 5}-77-0123456789abcdef").write_bytes(b"stale")


CATALOGUE = (
    Fault("1", "another operation on one rank", other_operation, MISMATCH,
          ("collective 2", "rank 2: broadcast", "all_reduce", "in other_operation")),
    Fault("1-root", "another root on one rank", other_root, MISMATCH,
          ("collective 2", "rank 3: broadcast", "root 1", "root 0")),
    Fault("1-reduce-op", "another reduction on one rank", other_reduce_op, MISMATCH,
          ("collective 2", "rank 1: all_reduce(max", "all_reduce(sum")),
    Fault("2", "another count on one rank", other_numel, MISMATCH,
          ("collective 2", "rank 1: all_reduce", "numel 9", "numel 8")),
    Fault("3", "another dtype on one rank", other_dtype, MISMATCH,
          ("collective 2", "rank 3: all_reduce", "float64", "float32")),
    Fault("3-message", "recv of another size than sent", other_message, MISMATCH,
          ("rank 0 called send(", "12 bytes", "rank 1 called recv(", "8 bytes",
           "in other_message")),
    Fault("4", "two collectives in swapped order", swapped_order, MISMATCH,
          ("collective 2", "rank 1: all_gather", "all_reduce")),
    Fault("4-groups", "two groups in crossed order", crossed_groups, LATE,
          ("in all_reduce, collective 1", "missing: rank", "waiting as rank", "of group '1'",
           "of group '2'", "in crossed_groups")),
    Fault("5", "subgroups created in another order", subgroups_in_another_order,
          (MISMATCH, LOST, "DistStoreError"), victims={3: "any"}),
    Fault("5-members", "a subgroup created with other members", subgroup_with_other_members,
          MISMATCH, ("ranks [0, 1, 2]", "ranks [0, 2, 3]", "in subgroup_with_other_members")),
    Fault("6", "a rank skips a call", skipped_call, LATE,
          ("in all_reduce, collective 2", "missing: rank 1", "after collective 1, barrier"),
          {1: "returned"}),
    Fault("7", "a rank raises before a barrier", raise_before_barrier, LOST,
          ("rank 3", "in barrier, collective 2"), {3: "KeyError"}),
    Fault("8", "SIGKILL in a collective", in_the_middle(lambda: os.kill(os.getpid(), 9)), LOST,
          ("rank 2", "has died", "in all_reduce, collective"), {2: "SIGKILL"}),
    Fault("9", "SIGSTOP in a collective", in_the_middle(lambda: os.kill(os.getpid(), 19)), LATE,
          ("rank 2", "stopped", "in all_reduce, collective"), {2: "hangs"}),
    Fault("10-term", "SIGTERM while waiting", signal_in_a_wait(signal.SIGTERM), LOST,
          ("rank 2", "has died", "in all_reduce, collective 2"), {2: "SIGTERM"}),
    Fault("10-int", "SIGINT while waiting", signal_in_a_wait(signal.SIGINT), LOST,
          ("rank 2", "all_reduce", "collective 2"), {2: "KeyboardInterrupt"}),
    Fault("11-segv", "a segmentation fault", in_the_middle(lambda: ctypes.string_at(8)), LOST,
          ("rank 2", "has died", "in all_reduce, collective"), {2: "SIGSEGV"}),
    Fault("11-abort", "abort() in native code", in_the_middle(os.abort), LOST,
          ("rank 2", "has died", "in all_reduce, collective"), {2: "SIGABRT"}),
    Fault("12", "the GIL held by one rank", hold_the_gil, LATE,
          ("missing: rank 1", "in all_reduce, collective 2")),
    Fault("13", "a rank never joins", never_join, LATE, ("rank 3 did not come",),
          {3: "returned"}, joins=False),
    Fault("13-dies", "a rank dies while it joins", die_while_joining, LOST,
          ("rank 2", "has died", "while the group was being created"),
          {2: "SIGKILL", 3: "any"}, joins=False),
    Fault("14", "two jobs at once", many_sums, "returned", num_jobs=2),
    Fault("16", "out of memory on one rank", out_of_memory, LOST,
          ("rank 2", "in all_reduce, collective 2"), {2: "RuntimeError"}),
    Fault("17", "a bit flipped in the shared memory", flipped_bit, "CollectiveError",
          ("in all_gather, collective 2", "read other bytes than rank 1 wrote", "[0, 400)"),
          env={CHECK.name: "1"}),
    Fault("18", "stale shared memory of a crashed run", many_sums, "returned",
          prepare=leave_a_segment),
    Fault("19", "shared memory is full", join, "CollectiveError", ("shared memory is full",),
          joins=False, shm_size="256k"),
)  # fmt: skip


def select(ids: Iterable[str]) -> list[Fault]:
    """The faults with these ids; "10" stands for "10-term", too. All when there are none.

    Raises:
        ValueError: no fault has that id.
    """
    wanted = list(ids)
    chosen = [f for f in CATALOGUE if not wanted or {f.id, f.id.split("-")[0]} & set(wanted)]
    known = {f.id for f in CATALOGUE} | {f.id.split("-")[0] for f in CATALOGUE}
    if unknown := [id for id in wanted if id not in known]:
        raise ValueError(
            f"no fault {', '.join(unknown)}; there are {', '.join(f.id for f in CATALOGUE)}"
        )
    return chosen
