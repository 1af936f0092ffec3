"""Each fault of a call ends soon, on every rank, with an error that says who and what."""

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ThreadRanks, leftovers, run_threads, small_tmpfs

from primitives import errors


def all_reduce(backend: Any, numel: int = 8, dtype: torch.dtype = torch.float32) -> None:
    backend.allreduce([torch.ones(numel, dtype=dtype)]).wait()


@pytest.mark.parametrize(
    ("odd_one", "words"),
    [
        (lambda b: all_reduce(b, 9), ["numel 8", "numel 9"]),
        (lambda b: all_reduce(b, 8, torch.float16), ["float32", "float16"]),
        (lambda b: b.broadcast([torch.ones(8)]).wait(), ["all_reduce(sum", "broadcast(", "root 0"]),
        (lambda b: b.barrier().wait(), ["rank 0, 2: all_reduce", "rank 1: barrier"]),
    ],
)
def test_mismatch_names_both_sides_on_all_ranks(odd_one: Any, words: list[str]) -> None:
    ranks = ThreadRanks(3)
    all_of_one = ranks.errors(lambda b, r: odd_one(b) if r == 1 else all_reduce(b))
    for error in all_of_one:
        assert isinstance(error, errors.CollectiveMismatch)
        assert "collective 1 of group" in str(error)
        for word in words:
            assert word in str(error)
    # A failed group stays failed, on the caller's thread and on the queue.
    for error in ranks.errors(lambda b, r: all_reduce(b)):
        assert isinstance(error, errors.CollectiveMismatch)
    ranks.close()


def line_of(text: str) -> str:
    """Where ``text`` stands in this file, as errors name it."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.strip() == text)
    return f"{Path(__file__).name}:{number} in "


@pytest.mark.parametrize("asynchronous", [False, True])
def test_mismatch_names_both_call_sites(asynchronous: bool) -> None:
    ranks = ThreadRanks(2)
    x = torch.ones(3)

    def call(backend: Any, rank: int) -> None:
        reduce, broadcast = dist.AllreduceOptions(), dist.BroadcastOptions()
        reduce.asyncOp = broadcast.asyncOp = asynchronous
        calls = [
            lambda: backend.allreduce([x], reduce),
            lambda: backend.broadcast([x], broadcast),
        ]
        work = calls[rank]()
        time.sleep(0.1 * asynchronous)  # the error is found on another thread
        work.wait()

    start = time.monotonic()
    for error in ranks.errors(call):
        assert isinstance(error, errors.CollectiveMismatch)
        text = str(error)
        assert line_of("lambda: backend.allreduce([x], reduce),") + "<lambda>; rank 1: " in text
        assert line_of("lambda: backend.broadcast([x], broadcast),") + "<lambda>" in text
    assert time.monotonic() - start < 1
    ranks.close()


def test_message_mismatch_names_both_call_sites() -> None:
    ranks = ThreadRanks(2)
    x = torch.ones(3)

    def call(backend: Any, rank: int) -> None:
        if rank == 0:
            backend.send([x], 1, 0).wait()
        else:
            backend.recv([x[:2]], 0, 0).wait()

    error = ranks.errors(call)[1]
    assert isinstance(error, errors.CollectiveMismatch)
    assert line_of("backend.send([x], 1, 0).wait()") + "call, but rank 1 called recv" in str(error)
    assert line_of("backend.recv([x[:2]], 0, 0).wait()") + "call" in str(error)
    ranks.close()


def test_timeout_says_where_every_rank_stands() -> None:
    ranks = ThreadRanks(4, timeout_s=1.5)

    def call(backend: Any, rank: int) -> None:
        if rank < 2:
            all_reduce(backend)
        elif rank == 3:
            time.sleep(0.5)  # its own deadline comes later
            backend.recv([torch.empty(1)], 2, 7).wait()

    for error in ranks.errors(call)[:2]:
        text = str(error)
        assert isinstance(error, errors.CollectiveTimeout)
        assert "missing: rank 2 (pid" in text
        assert "which made no collective call yet" in text
        assert "waiting as recv from rank 2, tag 7 on rank 3" in text
        assert "inside collective 1, all_reduce at " in text
        site = line_of("backend.allreduce([torch.ones(numel, dtype=dtype)]).wait()")
        assert text.count(site) >= 2
    ranks.close()


def test_nan_factors_are_equal_to_themselves() -> None:
    ranks = ThreadRanks(2)

    def call(backend: Any, rank: int) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = dist._make_nccl_premul_sum(float("nan"))
        x = torch.ones(2)
        backend.allreduce([x], options).wait()
        assert torch.isnan(x).all()

    ranks(call)
    ranks.close()


def test_closing_from_two_threads_at_once() -> None:
    for _ in range(5):
        ranks = ThreadRanks(2)
        options = dist.AllreduceOptions()
        options.asyncOp = True
        ranks(lambda b, r: b.allreduce([torch.ones(4)], options).wait())  # noqa: B023
        ranks(lambda b, r: b.send([torch.ones(1)], 1 - r, 0).wait())
        run_threads(4, lambda i: ranks.backends[i % 2].shutdown())  # noqa: B023
        ranks.backends = []


def test_other_members_are_a_mismatch_at_creation() -> None:
    from primitives import _C

    store = dist.HashStore()

    def join(rank: int) -> str:
        options = _C.Backend.Options(timedelta(seconds=5))
        options.global_ranks_in_group = [0, 2 + rank]
        options.group_name = "other members"  # what is wrong with it is told to groups of the name
        with pytest.raises(errors.CollectiveMismatch) as caught:
            _C.Backend(store, rank, len([0, 1]), options)
        return str(caught.value)

    start = time.monotonic()
    for text in run_threads(2, join):
        assert "rank 0: ranks [0, 2] at " in text
        assert "rank 1: ranks [0, 3] at " in text
        assert text.count(line_of("_C.Backend(store, rank, len([0, 1]), options)")) == 2
    assert time.monotonic() - start < 1
    assert leftovers() == []


def test_factors_are_told_apart() -> None:
    ranks = ThreadRanks(2)

    def call(backend: Any, rank: int) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = dist._make_nccl_premul_sum(1e-9 * (rank + 1))
        backend.allreduce([torch.ones(2)], options).wait()

    for error in ranks.errors(call):
        assert isinstance(error, errors.CollectiveMismatch)
        assert "rank 0: all_reduce" in str(error)
        assert "rank 1: all_reduce" in str(error)
    ranks.close()


def test_uneven_lists_that_do_not_fit() -> None:
    ranks = ThreadRanks(2)

    def gather(backend: Any, rank: int) -> None:
        sizes = [3, 4] if rank == 0 else [3, 5]
        outs = [torch.empty(size) for size in sizes]
        backend.allgather([outs], [torch.ones(sizes[rank])]).wait()

    for error in ranks.errors(gather):
        assert isinstance(error, errors.CollectiveMismatch)
    ranks.close()


def test_timeout_names_the_missing_rank() -> None:
    ranks = ThreadRanks(3, timeout_s=0.5)
    ranks(lambda b, r: all_reduce(b))
    start = time.monotonic()
    found = ranks.errors(lambda b, r: all_reduce(b) if r != 2 else None)
    assert time.monotonic() - start < 5
    assert found[2] is None
    for error in found[:2]:
        assert isinstance(error, errors.CollectiveTimeout)
        assert "in all_reduce, collective 2" in str(error)
        assert "missing: rank 2" in str(error)
        assert "after collective 1, all_reduce" in str(error)
    ranks.close()


def test_a_rank_that_leaves_is_lost_to_the_others() -> None:
    ranks = ThreadRanks(3, timeout_s=30)

    def call(backend: Any, rank: int) -> None:
        if rank == 0:
            backend.shutdown()
        else:
            all_reduce(backend)

    for error in ranks.errors(call)[1:]:
        assert isinstance(error, errors.PeerLost)
        assert "rank 0" in str(error)
        assert "has left" in str(error)
    ranks.close()


def test_abort_frees_a_blocked_wait_everywhere() -> None:
    ranks = ThreadRanks(3, timeout_s=30)

    def call(backend: Any, rank: int) -> None:
        if rank == 0:
            timer = threading.Timer(0.2, backend.abort)
            timer.start()
        if rank < 2:
            all_reduce(backend)
        else:
            backend.recv([torch.empty(1)], 0, 0).wait()

    start = time.monotonic()
    for error in ranks.errors(call):
        assert isinstance(error, errors.PeerLost)
        assert "aborted" in str(error)
    assert time.monotonic() - start < 5
    ranks.close()


def test_caller_mistakes_are_value_errors_and_harm_nobody() -> None:
    ranks = ThreadRanks(2)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.AVG

    def call(backend: Any, rank: int) -> None:
        wrong = [
            (lambda: backend.allreduce([torch.ones(2, dtype=torch.int32)], options), "int32"),
            (lambda: backend.allreduce([torch.ones(2, device="meta")]), "meta"),
            (lambda: backend.allreduce([torch.eye(2).to_sparse_csr()]), "dense"),
            (lambda: backend._allgather_base(torch.empty(5), torch.ones(2)), "expected 4"),
            (lambda: backend._allgather_base(torch.empty(4).int(), torch.ones(2)), "float32"),
            (lambda: backend.allgather([[torch.empty(2)]], [torch.ones(2)]), "2, got 1"),
            (lambda: backend.alltoall_base(torch.empty(2), torch.ones(2), [2, 1], []), "[2, 1]"),
            (lambda: backend.send([torch.ones(2)], 5, 0), "[0, 2)"),
        ]
        for function, word in wrong:
            with pytest.raises(ValueError) as caught:
                function().wait()
            assert word in str(caught.value), str(caught.value)
        all_reduce(backend)

    ranks(call)
    ranks.close()


def test_messages_by_tag_any_source_and_mismatch() -> None:
    ranks = ThreadRanks(3, timeout_s=20)
    big = torch.arange(200_000.0)

    def call(backend: Any, rank: int) -> Any:
        if rank == 0:
            first, second, third = torch.empty_like(big), torch.empty(3), torch.empty(1)
            backend.recv([second], 1, 5).wait()  # behind the big one with tag 4
            backend.recv([first.view(2, -1).t()], 1, 4).wait()
            work = backend.recv_anysource([third], 9)
            work.wait()
            return first, second, third, work._source_rank()
        if rank == 1:
            works = [backend.send([big], 0, 4), backend.send([torch.ones(3)], 0, 5)]
            for work in works:
                work.wait()
        else:
            backend.send([torch.tensor([2.5])], 0, 9)
        return None

    first, second, third, source = ranks(call)[0]
    assert torch.equal(first.view(2, -1).t().reshape(-1), big)
    assert second.tolist() == [1, 1, 1]
    assert (third.item(), source) == (2.5, 2)

    def wrong(backend: Any, rank: int) -> None:
        if rank == 0:
            backend.recv([torch.empty(2)], 1, 0).wait()
        elif rank == 1:
            backend.send([torch.ones(3)], 0, 0)
            backend.recv([torch.ones(3)], 0, 1).wait()

    for error in ranks.errors(wrong)[:2]:
        assert isinstance(error, errors.CollectiveMismatch)
        assert "12 bytes" in str(error)
        assert "8 bytes" in str(error)
    ranks.close()


def test_recv_times_out_and_names_the_peer() -> None:
    ranks = ThreadRanks(2, timeout_s=0.5)
    found = ranks.errors(lambda b, r: b.recv([torch.empty(1)], 1, 3).wait() if r == 0 else None)
    assert isinstance(found[0], errors.CollectiveTimeout)
    assert "recv from rank 1, tag 3 on rank 0" in str(found[0])
    ranks.close()


def test_a_rank_that_never_joins_is_named() -> None:
    from primitives import _C

    store = dist.HashStore()

    def join(rank: int) -> str:
        with pytest.raises(errors.CollectiveTimeout) as caught:
            _C.Backend(store, rank, 3, _C.Backend.Options(timedelta(seconds=0.5)))
        return str(caught.value)

    for text in run_threads(2, join):
        assert "rank 2 did not come" in text
    assert leftovers() == []


def test_full_shared_memory_is_one_clear_error_on_every_rank(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, "1m") as folder:
        for error in run_threads(2, lambda r: create_error(r, folder, STORE)):
            assert type(error) is errors.CollectiveError
            assert "shared memory is full" in str(error)
            assert "bytes free" in str(error)
        assert list(tmp_path.iterdir()) == []


STORE = dist.HashStore()


def create_error(rank: int, folder: str, store: Any) -> BaseException | None:
    from primitives import _C

    options = _C.Backend.Options(timedelta(seconds=5))
    options.shm_dir = folder
    try:
        _C.Backend(store, rank, 2, options)
    except Exception as error:
        return error
    return None


def test_no_such_folder_is_an_error_on_every_rank(tmp_path: Path) -> None:
    store = dist.HashStore()
    for error in run_threads(2, lambda r: create_error(r, str(tmp_path / "none"), store)):
        assert type(error) is errors.CollectiveError
        assert "No such file" in str(error)


def test_sweep_removes_only_what_a_dead_owner_left(tmp_path: Path) -> None:
    from primitives import _C

    uid = os.getuid()
    start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    stale = tmp_path / f"primitives-{uid}-{2**22 + 5}-77-abc"
    reused = tmp_path / f"primitives-{uid}-{os.getpid()}-{int(start) - 1}-abc"
    keep = [
        tmp_path / f"primitives-{uid}-{os.getpid()}-{start}-abc",
        tmp_path / f"primitives-{uid + 1}-{2**22 + 5}-77-abc",
        tmp_path / "primitives-other",
    ]
    for path in (stale, reused, *keep):
        path.touch()
    assert _C.sweep_segments(str(tmp_path)) == 2
    assert sorted(tmp_path.iterdir()) == sorted(keep)
