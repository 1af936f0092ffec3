"""The Communicator: bits, buffers of every kind, meetings, refusals, failures."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ROOT, leftovers, run_threads
from test_backend_bits import CASES, assert_bits, draw

from primitives import reference
from primitives.communicator import Communicator
from primitives.errors import CollectiveError, CollectiveMismatch, CollectiveTimeout, PeerLost


def on_ranks(world_size: int, body: Callable[[Communicator], Any], **options: Any) -> list[Any]:
    """``body(communicator)`` on ranks that are threads; what each returned."""
    store = dist.HashStore()

    def call(rank: int) -> Any:
        with Communicator.from_store(store, rank, world_size, timeout_s=20, **options) as comm:
            result = body(comm)
            comm.barrier()
            return result

    return run_threads(world_size, call)


def errors_of(world_size: int, body: Callable[[Communicator], Any], timeout_s: float) -> list[Any]:
    store = dist.HashStore()

    def call(rank: int) -> Any:
        comm = Communicator.from_store(store, rank, world_size, timeout_s=timeout_s)
        try:
            return body(comm)
        except CollectiveError as error:
            return error
        finally:
            comm.close()

    return run_threads(world_size, call)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(CASES), st.sampled_from([1, 7, 513, 20_000]), st.integers(1, 5))
def test_reductions_have_the_bits_of_the_definition(case: Any, numel: int, n: int) -> None:
    dtype, op = case
    xs = [draw((n * numel,), dtype, 11 * r) for r in range(n)]
    everywhere = reference.all_reduce(xs, op)[0]

    def body(comm: Communicator) -> Any:
        whole, rooted = xs[comm.rank].clone(), xs[comm.rank].clone()
        shard = torch.empty(numel, dtype=dtype)
        comm.all_reduce(whole, op)
        comm.reduce_scatter(shard, xs[comm.rank], op)
        comm.reduce(rooted, n - 1, op)
        return whole, shard, rooted

    for rank, (whole, shard, rooted) in enumerate(on_ranks(n, body)):
        assert_bits(whole, everywhere)
        assert_bits(shard, everywhere[rank * numel : (rank + 1) * numel])
        assert_bits(rooted, everywhere if rank == n - 1 else xs[rank])


@pytest.mark.parametrize("numel", [2**22 - 1, 2**22, 2**23 + 3])
def test_results_that_fill_the_caches_are_written_around_them(numel: int) -> None:
    xs = [draw((2 * numel,), torch.uint8, 5 * r) for r in range(2)]

    def body(comm: Communicator) -> Any:
        rank = comm.rank
        gathered = torch.empty(2 * numel, dtype=torch.uint8)
        exchanged, summed = torch.empty_like(gathered), torch.empty(numel, dtype=torch.uint8)
        comm.all_gather(gathered, xs[rank][:numel])
        comm.all_to_all(exchanged, xs[rank])
        comm.reduce_scatter(summed, xs[rank])
        return gathered, exchanged, summed

    for rank, (gathered, exchanged, summed) in enumerate(on_ranks(2, body)):
        part = slice(rank * numel, (rank + 1) * numel)
        assert_bits(gathered, torch.cat([x[:numel] for x in xs]))
        assert_bits(exchanged, torch.cat([x[part] for x in xs]))
        assert_bits(summed, reference.all_reduce(xs, "sum")[0][part])


def test_symmetric_memory_has_the_same_bits_and_is_not_staged() -> None:
    n, numel = 3, 20_000
    xs = [draw((n * numel,), torch.float32, 7 * r) for r in range(n)]
    everywhere = reference.all_reduce(xs, "sum")[0]

    def body(comm: Communicator) -> Any:
        whole, shard = comm.empty(n * numel).copy_(xs[comm.rank]), comm.empty(numel)
        gathered = comm.empty(n, numel)
        comm.reduce_scatter(shard, whole)
        comm.all_gather(gathered.numpy(), shard)
        comm.all_reduce(whole)
        assert comm.num_zero_copy == 3
        comm.all_reduce(torch.zeros(n * numel))
        assert comm.num_zero_copy == 3
        return whole, shard, gathered

    for rank, (whole, shard, gathered) in enumerate(on_ranks(n, body)):  # all have left by now
        assert_bits(whole, everywhere)
        assert_bits(shard, everywhere[rank * numel : (rank + 1) * numel])
        assert_bits(gathered.flatten(), everywhere)


def test_symmetric_memory_of_different_sizes_is_a_mismatch() -> None:
    errors = errors_of(2, lambda c: c.empty(4 + c.rank, dtype=torch.int8), timeout_s=20)
    for error in errors:
        assert isinstance(error, CollectiveMismatch)
        assert "empty(int8, numel 5)" in str(error)


def test_moves() -> None:
    def body(comm: Communicator) -> None:
        n, rank = comm.world_size, comm.rank
        full = np.full((n, 2), -1)
        full[rank] = rank  # in place
        comm.all_gather(full, full[rank])
        assert full.tolist() == [[r, r] for r in range(n)]

        counts = list(range(n))
        uneven = np.empty(sum(counts), np.complex64)
        comm.all_gather(uneven, np.full(rank, 1j * rank, np.complex64), counts=counts)
        assert uneven.tolist() == [1j * r for r in range(n) for _ in range(r)]

        data = np.arange(3) * (rank == 2)
        comm.broadcast(data, root=2)
        assert data.tolist() == [0, 1, 2]

        gathered = np.empty(n, np.int16) if rank == 1 else None
        comm.gather(gathered, np.array([rank], np.int16), root=1)
        assert gathered is None or gathered.tolist() == list(range(n))

        mine = np.empty(2)
        comm.scatter(mine, np.arange(2.0 * n) if rank == 3 else None, root=3)
        assert mine.tolist() == [2 * rank, 2 * rank + 1]

        # Rank r sends s elements to rank s.
        sent = np.concatenate([np.full(s, 10 * rank + s) for s in range(n)])
        received = np.empty(n * rank, np.int64)
        comm.all_to_all(received, sent, [rank] * n, list(range(n)))
        assert received.tolist() == [10 * r + rank for r in range(n) for _ in range(rank)]

        summed = np.empty(rank, np.float32)
        comm.reduce_scatter(summed, np.ones(sum(counts), np.float32), "sum", counts)
        assert summed.tolist() == [n] * rank

        if rank == 0:
            comm.send(np.arange(5), 1, tag=3)
        elif rank == 1:
            got = np.empty(5, np.int64)
            assert comm.recv(got, tag=3) == 0
            assert got.tolist() == list(range(5))

    on_ranks(4, body)


class OnlyDLPack:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda v: np.full(3, v, np.float16), lambda x: x.tolist()),
        (lambda v: torch.full((3,), v, dtype=torch.bfloat16), lambda x: x.tolist()),
        (lambda v: OnlyDLPack(torch.full((3,), v)), lambda x: x.tensor.tolist()),
        (lambda v: bytearray([int(v)] * 3), list),
        (lambda v: memoryview(np.full((3, 1), v, ">u1")), lambda x: x.tolist()),
    ],
)
def test_memory_of_every_kind(make: Any, read: Any) -> None:
    def body(comm: Communicator) -> None:
        data = make(2.0 + comm.rank)
        comm.all_reduce(data)
        flat = np.array(read(data)).ravel().tolist()
        assert flat == [5, 5, 5]

    on_ranks(2, body)


def test_float8_moves_and_is_not_summed() -> None:
    def body(comm: Communicator) -> None:
        data = torch.full((4,), 1.0 + comm.rank).to(torch.float8_e4m3fn)
        out = torch.empty(8, dtype=torch.float8_e4m3fn)
        comm.all_gather(out, data)
        assert out.float().tolist() == [1.0] * 4 + [2.0] * 4
        with pytest.raises(ValueError, match="sum is not defined for"):
            comm.all_reduce(data)

    on_ranks(2, body)


def frozen() -> np.ndarray:
    array = np.zeros(4)
    array.flags.writeable = False
    return array


full = np.zeros(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.all_reduce(frozen()), "expected writable memory, got read-only memory"),
        (lambda c: c.all_reduce(b"1234"), "expected writable memory"),
        (lambda c: c.all_reduce(np.zeros(8)[::2]), "contiguous memory, got strides of"),
        (lambda c: c.all_reduce(torch.zeros(4, 4).t()), "contiguous memory, got a tensor of shape"),
        (lambda c: c.all_reduce([1.0, 2.0]), "DLPack, got list"),
        (lambda c: c.all_reduce(np.zeros(2, ">f4")), "byte order, got format '>f'"),
        (lambda c: c.all_reduce(np.zeros(2, np.longdouble)), "got format 'g'"),
        (lambda c: c.all_reduce(np.zeros(2), "mean"), "op: expected sum, avg.*got 'mean'"),
        (lambda c: c.all_reduce(np.zeros(2, np.int64), "avg"), "avg is not defined for int64"),
        (lambda c: c.all_gather(np.zeros(9), np.zeros(4)), "out: expected 8 elements, got 9"),
        (lambda c: c.all_gather(full, np.zeros(4, "f4")), "expected dtype float32, got float64"),
        (lambda c: c.all_gather(full, full[1:5]), "out: expected memory apart from the input"),
        (lambda c: c.all_gather(full, full[:4], counts=[4]), "expected 2 counts that sum to 8"),
        (
            lambda c: c.all_gather(full, full[:4], counts=[9, -1]),
            "counts that sum to 8 elements, got 9 -1",
        ),
        (lambda c: c.reduce_scatter(full[:4], full[1:]), "full: expected 8 elements, got 7"),
        (lambda c: c.all_to_all(np.zeros(3), np.zeros(3)), "a multiple of 2 elements, got 3"),
        (lambda c: c.broadcast(np.zeros(3), 2), r"root: expected a rank in \[0, 2\), got 2"),
        (lambda c: c.send(np.zeros(3), -1), r"dst: expected a rank in \[0, 2\), got -1"),
        (lambda c: c.empty(2, -3), r"empty: expected sizes >= 0, got \[2, -3\]"),
        (lambda c: c.split(-2), "expected a color >= 0 or None, got -2"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_moves(call: Any, message: str) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            call(comm)

    on_ranks(2, body)


def test_split() -> None:
    def body(comm: Communicator) -> None:
        part = comm.split(None if comm.rank == 4 else comm.rank % 2, key=-comm.rank)
        if comm.rank == 4:
            assert part is None
            return
        assert part is not None
        with part:
            members = np.empty(2, np.int64)
            part.all_gather(members, np.array([comm.rank]))
            assert members.tolist() == [comm.rank % 2 + 2, comm.rank % 2]

    on_ranks(5, body)


def test_a_mismatch_names_both_sides() -> None:
    errors = errors_of(3, lambda c: c.all_reduce(np.zeros(4 if c.rank else 5)), timeout_s=20)
    for error in errors:
        assert isinstance(error, CollectiveMismatch)
        assert "rank 0: all_reduce(sum, float64, numel 5)" in str(error)
        assert "all_reduce(sum, float64, numel 4)" in str(error)


def test_a_rank_that_left_or_is_late_is_named() -> None:
    def leave(comm: Communicator) -> None:
        if comm.rank != 1:
            comm.barrier()

    lost = errors_of(3, leave, timeout_s=20)
    assert all(isinstance(lost[r], PeerLost) and "rank 1" in str(lost[r]) for r in (0, 2))

    def sleep(comm: Communicator) -> None:
        if comm.rank == 2:
            time.sleep(1.5)
        comm.barrier()

    late = errors_of(3, sleep, timeout_s=0.5)
    assert all(isinstance(error, CollectiveTimeout) for error in late)
    assert "missing: rank 2" in str(late[0])


def test_abort_ends_a_blocked_call() -> None:
    def body(comm: Communicator) -> None:
        if comm.rank == 0:
            threading.Timer(0.3, comm.abort, ["enough"]).start()
            comm.recv(np.zeros(1), 1)
        else:
            comm.barrier()

    for error in errors_of(2, body, timeout_s=20):
        assert isinstance(error, PeerLost)
        assert "enough" in str(error)


FILE_RANK = """
import sys, numpy as np
from primitives.communicator import Communicator
path, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Communicator.from_file(path, rank, world, timeout_s=20) as comm:
    x = np.array([rank + 1.0]); comm.all_reduce(x); print(x[0])
import torch.distributed as dist
assert not dist.is_initialized()
"""


def test_processes_meet_through_a_file_though_a_stale_one_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "meeting"
    path.write_text(json.dumps({"port": 1, "pid": os.getpid(), "start": 17}))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FILE_RANK, str(path), str(rank), "3"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 2, 0)
    ]
    assert [p.communicate(timeout=60)[0].strip() for p in processes] == ["6.0"] * 3
    assert list(tmp_path.iterdir()) == []
    assert [name for p in processes for name in leftovers(p.pid)] == []


def test_a_meeting_file_names_who_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "meeting"
    with pytest.raises(CollectiveTimeout, match=r"rank 1, rank 2 did not come within 300 ms"):
        Communicator.from_file(path, 0, 3, timeout_s=0.3)
    assert not path.exists()
    path.write_text(json.dumps({"port": 1, "pid": os.getpid(), "start": 17}))
    with pytest.raises(CollectiveTimeout, match=r"rank 0 did not come.*left over from process"):
        Communicator.from_file(path, 1, 3, timeout_s=0.3)


def test_two_jobs_do_not_meet_at_one_file(tmp_path: Path) -> None:
    path = tmp_path / "meeting"
    with subprocess.Popen(["sleep", "60"]) as other:
        start = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        path.write_text(json.dumps({"port": 1, "pid": other.pid, "start": int(start)}))
        with pytest.raises(ValueError, match=f"the meeting of process {other.pid}, which lives"):
            Communicator.from_file(path, 0, 2, timeout_s=0.3)
        other.kill()
