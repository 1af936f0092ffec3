"""Forks, callbacks, and what runs out: nothing hangs, nothing dies, nobody is blamed wrongly."""

import os
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ProcessRanks, ThreadRanks, init, small_tmpfs

from primitives import errors


def forks_after_asynchronous_work() -> None:
    rank, _ = init()
    dist.all_reduce(torch.ones(3), async_op=True).wait()
    if rank == 0:
        pending = dist.all_reduce(torch.ones(3), async_op=True)
        child = os.fork()
        if child == 0:
            with pytest.raises(errors.CollectiveError, match="a fork cannot use it"):
                dist.all_reduce(torch.ones(3))
            sys.exit(0)  # an ordinary end, with every exit handler
        assert os.waitpid(child, 0)[1] == 0
        pending.wait()
    else:
        time.sleep(1.0)  # the child of rank 0 ends while a collective is running
        dist.all_reduce(torch.ones(3))
    dist.barrier()
    dist.destroy_process_group()


def test_a_forked_child_ends_and_leaves_the_group_alone(tmp_path: Path) -> None:
    target = "test_backend_lifetimes:forks_after_asynchronous_work"
    for code, output in ProcessRanks(target, 2, tmp_path).start().wait(20):
        assert code == 0, output


def callbacks_that_communicate() -> None:
    rank, world_size = init()
    total = torch.tensor([float(rank)])

    def then_gather(future: Any) -> list[torch.Tensor]:  # as DDP's PowerSGD hook does
        twice = future.value()[0] * 2
        work = dist.all_reduce(twice, async_op=True)
        work.get_future().wait()
        parts = [torch.empty(1) for _ in range(world_size)]
        dist.all_gather(parts, twice)
        return parts

    future = dist.all_reduce(total, async_op=True).get_future().then(then_gather)
    expected = float(world_size * (world_size - 1) * world_size)
    assert [part.item() for part in future.wait()] == [expected] * world_size
    dist.destroy_process_group()


def test_a_callback_may_communicate(tmp_path: Path) -> None:
    target = "test_backend_lifetimes:callbacks_that_communicate"
    for code, output in ProcessRanks(target, 2, tmp_path).start().wait(20):
        assert code == 0, output


def callbacks_that_wait_for_messages() -> None:
    rank, _ = init()
    large = torch.arange(1 << 20, dtype=torch.float32)  # does not fit into a ring
    peer = 1 - rank

    def then_exchange(future: Any) -> torch.Tensor:
        answer = torch.empty_like(large)
        sent = dist.isend(large + rank, peer, tag=1).get_future()
        dist.irecv(answer, peer, tag=1).get_future().wait()
        sent.wait()
        return answer

    dist.isend(torch.ones(1), peer)
    received = dist.irecv(torch.empty(1), peer).get_future().then(then_exchange)
    assert torch.equal(received.wait(), large + peer)

    # Works that were asked for before, and are completed by the threads that move data.
    first, second = torch.ones(1), torch.ones(1)
    works = [dist.all_reduce(first, async_op=True), dist.all_reduce(second, async_op=True)]
    chained = works[0].get_future().then(lambda _: works[1].get_future().wait())
    assert chained.wait()[0].item() == 2.0

    impatient = dist.new_group(timeout=timedelta(seconds=1))

    def never_comes(_: Any) -> None:  # the deadline counts in callbacks too
        dist.recv(torch.empty(1), peer, tag=99, group=impatient)

    ended = dist.all_reduce(first, async_op=True).get_future().then(never_comes)
    with pytest.raises(RuntimeError, match="recv from rank"):
        ended.wait()


def test_a_callback_may_wait_for_anything(tmp_path: Path) -> None:
    target = "test_backend_lifetimes:callbacks_that_wait_for_messages"
    for code, output in ProcessRanks(target, 2, tmp_path).start().wait(20):
        assert code == 0, output


def receives_into_bad_tensors() -> None:
    rank, _ = init()
    with torch.inference_mode():
        target = torch.zeros(4, 2).t()
        if rank == 0:
            dist.recv(target, 1)
            assert target.tolist() == [[1.0] * 4] * 2
            work = dist.all_reduce(target, async_op=True)
            with pytest.raises(ValueError, match="share memory"):
                dist.irecv(torch.zeros(1).expand(2), 1)
            work.wait()
        else:
            dist.send(torch.ones(2, 4), 0)
            dist.all_reduce(target)
    dist.barrier()
    dist.destroy_process_group()


def test_a_tensor_that_cannot_hold_a_message_is_refused(tmp_path: Path) -> None:
    target = "test_backend_lifetimes:receives_into_bad_tensors"
    for code, output in ProcessRanks(target, 2, tmp_path).start().wait(20):
        assert code == 0, output


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


def test_no_room_for_messages_is_an_error_on_both_sides(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, "2200k") as folder:
        ranks = ThreadRanks(2, timeout_s=30.0, shm_dir=folder)
        start = time.monotonic()

        def call(backend: Any, rank: int) -> None:
            if rank == 0:
                backend.send([torch.ones(2)], 1, 0).wait()
            else:
                backend.recv([torch.ones(2)], 0, 0).wait()

        for error in ranks.errors(call):
            assert isinstance(error, errors.CollectiveError)
            assert "shared memory is full" in str(error)
            assert "send to rank 1" in str(error)
        assert time.monotonic() - start < 5
        ranks.close()


def leaves_in_no_time() -> None:
    from primitives import _C

    rank, _ = init()
    dist.send(torch.ones(1), 1) if rank == 0 else dist.recv(torch.ones(1), 0)
    if rank == 0:
        _C.close_all_backends(0.0)
    else:
        with pytest.raises(errors.PeerLost, match="has left"):
            dist.barrier()


def test_no_time_to_leave_is_no_failure_when_nothing_is_pending(tmp_path: Path) -> None:
    target = "test_backend_lifetimes:leaves_in_no_time"
    for code, output in ProcessRanks(target, 2, tmp_path).start().wait(20):
        assert code == 0, output


def test_groups_come_and_go_on_threads() -> None:
    """Objects made by many threads at once are all known to Python when they are destroyed."""
    for i in range(600):
        ranks = ThreadRanks(2 + i % 7)
        ranks(lambda backend, _: backend.barrier().wait())
        ranks.close()
