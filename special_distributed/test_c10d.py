"""What torch.distributed promises beyond the collectives: groups, works, timeouts, messages."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from primitives import errors
from primitives.collectives import all_gather_flat, reduce_scatter_flat

NUM_RANKS = 4
TIMEOUT, COMM_ERROR = 1, 2  # torch's WorkResult


def total(group: Any = None, **options: Any) -> float:
    """The sum of the members' global ranks, by all_reduce."""
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x, group=group, **options)
    return x.item()


# ---- groups


def test_groups_of_some_ranks(world: dist.ProcessGroup, rank: int) -> None:
    odd = dist.new_group([1, 3])
    if rank % 2 == 1:
        assert total(odd) == 4.0
        assert dist.get_rank(odd) == rank // 2
        assert dist.get_process_group_ranks(odd) == [1, 3]
    else:
        assert odd is dist.GroupMember.NON_GROUP_MEMBER
    subgroup, groups = dist.new_subgroups(2)
    assert len(groups) == 2
    assert total(subgroup) == (1.0 if rank < 2 else 5.0)
    assert total() == 6.0


def test_groups_that_only_their_members_make(world: dist.ProcessGroup, rank: int) -> None:
    if rank in (0, 2):
        group = dist.new_group([0, 2], use_local_synchronization=True)
        assert total(group) == 2.0
        again = dist.new_group([0, 2], use_local_synchronization=True)
        assert total(again) == 2.0
        dist.destroy_process_group(again)
    assert total() == 6.0


def test_groups_of_groups(world: dist.ProcessGroup, rank: int) -> None:
    assert isinstance(world, dist.ProcessGroup)
    half = world.split_group([rank // 2 * 2, rank // 2 * 2 + 1], group_desc="half")
    x = torch.tensor([float(rank)])
    half.allreduce(x).wait()
    assert x.item() == (1.0 if rank < 2 else 5.0)
    alone = half.split_group([half.rank()])  # of one rank
    alone.allreduce(x).wait()
    assert x.item() == (1.0 if rank < 2 else 5.0)
    assert half.group_desc == "half"


def test_groups_are_merged(world: dist.ProcessGroup, rank: int) -> None:
    """Two halves become one group; torch numbers the ranks as they come."""
    half = world.split_group([rank // 2 * 2, rank // 2 * 2 + 1])
    store = dist.PrefixStore("merged", dist.distributed_c10d._get_default_store())
    merged = half.merge_remote_group(store, NUM_RANKS)
    assert merged.size() == NUM_RANKS
    for group in (half, merged):  # one backend for all devices
        on_cpu, on_cuda = (group._get_backend(torch.device(kind)) for kind in ("cpu", "cuda"))
        assert on_cpu is on_cuda
    x = torch.tensor([float(rank)])
    merged.allreduce(x).wait()
    assert x.item() == 6.0
    places = [torch.empty(1, dtype=torch.int64) for _ in range(NUM_RANKS)]
    merged.allgather(places, torch.tensor([merged.rank()])).wait()
    assert [place.item() for place in places] == list(range(NUM_RANKS))


def test_debug_level_detail(world: dist.ProcessGroup, rank: int) -> None:
    """torch then wraps the backend and checks each collective by its own means first."""
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        group = dist.new_group()
        assert total(group) == 6.0
        full = torch.empty(NUM_RANKS)
        all_gather_flat(full, torch.tensor([float(rank)]), group=group)
        assert full.tolist() == [0.0, 1.0, 2.0, 3.0]
        x = torch.empty(1)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, torch.tensor([float(rank)]), (rank + 1) % 4, group=group),
                dist.P2POp(dist.irecv, x, (rank - 1) % 4, group=group),
            ]
        )
        for work in works:
            work.wait()
        assert x.item() == (rank - 1) % 4
        with pytest.raises(RuntimeError, match="Detected mismatch between collectives"):
            dist.all_reduce(torch.ones(2 if rank == 1 else 3), group=group)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


# ---- coalescing


def test_coalesced_collectives_are_one_work(world: dist.ProcessGroup, rank: int) -> None:
    fulls = [torch.empty(NUM_RANKS * k) for k in (1, 3)]
    with _coalescing_manager(async_ops=True) as works:
        for full in fulls:
            all_gather_flat(full, torch.full((full.numel() // NUM_RANKS,), float(rank)))
    works.wait()
    for full in fulls:
        assert full.view(NUM_RANKS, -1)[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    shards = [torch.empty(k) for k in (1, 3)]
    with _coalescing_manager():
        for full, shard in zip(fulls, shards, strict=True):
            reduce_scatter_flat(shard, full)
    assert all(torch.equal(shard, torch.full_like(shard, rank * 4.0)) for shard in shards)
    tensors = [torch.full((k,), float(rank)) for k in (2, 5)]
    with _coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)
    assert [tensor[0].item() for tensor in tensors] == [6.0, 6.0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_coalesced_forms(world: dist.ProcessGroup, rank: int) -> None:
    sums = [torch.ones(2), torch.ones(5)]
    dist.all_reduce_coalesced(sums)
    assert all(torch.equal(x, torch.full_like(x, 4)) for x in sums)
    lists = [[torch.empty(2), torch.empty(1)] for _ in range(NUM_RANKS)]
    dist.all_gather_coalesced(lists, [torch.full((2,), float(rank)), torch.ones(1)])
    assert [x[0].tolist() for x in lists] == [[r, r] for r in range(NUM_RANKS)]


def test_coalesced_messages_are_one_work(world: dist.ProcessGroup, rank: int) -> None:
    backend = world._get_backend(torch.device("cpu"))
    assert backend.supports_coalescing
    peer, got = rank ^ 1, torch.empty(3)
    backend._start_coalescing()
    backend.send([torch.full((3,), float(rank))], peer, 4)
    backend.recv([got], peer, 4)
    work = backend._end_coalescing()
    work.wait()
    assert work.is_completed()
    assert work.is_success()
    assert got.tolist() == [float(peer)] * 3


# ---- works


@pytest.fixture
def impatient(world: dist.ProcessGroup) -> Any:
    """A group with a timeout of half a second."""
    return dist.new_group(timeout=timedelta(seconds=0.5))


def test_a_work_that_succeeds(world: dist.ProcessGroup, rank: int) -> None:
    x = torch.ones(3)
    work = dist.all_reduce(x, async_op=True)
    result = work.get_future_result()
    assert work.wait(timedelta(seconds=20))
    assert (work.is_completed(), work.is_success()) == (True, True)
    if torch.__version__ >= "2.13":  # before, torch could not hand an exception to Python
        assert work.exception() is None
    assert result.wait() == 0
    assert work.get_future().value()[0].data_ptr() == x.data_ptr()
    assert work.result()[0].tolist() == [4.0] * 3


def test_a_work_that_fails(impatient: Any, rank: int) -> None:
    if rank == 0:
        work = dist.all_reduce(torch.ones(3), group=impatient, async_op=True)
        result = work.get_future_result()
        with pytest.raises(errors.CollectiveTimeout, match="missing: rank 1"):
            work.wait()
        assert work.is_completed()
        assert not work.is_success()
        with pytest.raises(errors.CollectiveTimeout):
            work.get_future().wait()
        assert result.wait() == TIMEOUT
        coalesced = dist.all_reduce(torch.ones(3), async_op=True)
    else:
        coalesced = dist.all_reduce(torch.ones(3), async_op=True)
    coalesced.wait()


def test_waiting_has_a_limit_of_its_own(world: dist.ProcessGroup, rank: int) -> None:
    """A wait that gives up leaves the collective going on."""
    x = torch.ones(3)
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        start = time.monotonic()
        with pytest.raises(errors.CollectiveTimeout, match="the operation goes on"):
            work.wait(timedelta(milliseconds=50))
        assert time.monotonic() - start < 5
        dist.send(torch.ones(1), 1, tag=8)
        work.wait()
    else:
        if rank == 1:
            dist.recv(torch.empty(1), 0, tag=8)
        dist.all_reduce(x)
    assert x.tolist() == [4.0] * 3


def test_a_call_has_a_timeout_of_its_own(world: dist.ProcessGroup, rank: int) -> None:
    group = dist.new_group()
    if rank == 0:
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=0.2)
        with pytest.raises(errors.CollectiveTimeout):
            group.allreduce([torch.ones(1)], options).wait()
    assert total() == 6.0


def test_abort_frees_a_blocked_wait(world: dist.ProcessGroup, rank: int) -> None:
    group = dist.new_group()
    if rank == 3:
        time.sleep(0.2)
        group.abort()
        return
    work = dist.irecv(torch.empty(1), 3, group=group)
    with pytest.raises(errors.PeerLost, match="aborted"):
        work.wait()
    with pytest.raises(errors.PeerLost, match="aborted"):
        dist.all_reduce(torch.ones(1), group=group)


# ---- monitored barrier


def test_monitored_barrier_names_who_is_missing(world: dist.ProcessGroup, rank: int) -> None:
    limit = timedelta(seconds=0.5)
    world.monitored_barrier(timedelta(seconds=20), True)
    if rank in (0, 3):
        with pytest.raises(errors.CollectiveTimeout) as caught:
            world.monitored_barrier(limit, wait_all_ranks=True)
        assert "Ranks 1, 2 failed to pass monitoredBarrier in 500 ms" in str(caught.value)
        assert "rank 1 (pid" in str(caught.value)
    if rank == 0:
        with pytest.raises(errors.CollectiveTimeout, match="Rank 1 failed to pass"):
            world.monitored_barrier(limit, wait_all_ranks=False)
    dist.barrier()  # the group goes on
    if rank in (1, 2):  # they learn from the verdict that they were late
        with pytest.raises(errors.CollectiveTimeout, match=f"Rank {rank} successfully reached"):
            world.monitored_barrier(limit)


# ---- messages


def test_tags_and_any_source(world: dist.ProcessGroup, rank: int) -> None:
    if rank == 0:
        later, sooner = torch.empty(2), torch.empty(2)
        dist.recv(sooner, 1, tag=2)  # behind the one with tag 1
        dist.recv(later, 1, tag=1)
        assert (sooner.tolist(), later.tolist()) == ([2.0, 2.0], [1.0, 1.0])
        seen = {}
        for _ in range(2):
            value = torch.empty(1)
            source = dist.recv(value, None, tag=5)
            seen[source] = value.item()
        assert seen == {2: 20.0, 3: 30.0}
    elif rank == 1:
        for tag in (1, 2):
            dist.isend(torch.full((2,), float(tag)), 0, tag=tag)  # nobody keeps the work
    else:
        dist.send(torch.tensor([10.0 * rank]), 0, tag=5)


def test_a_message_to_oneself(world: dist.ProcessGroup, rank: int) -> None:
    with pytest.raises(ValueError, match="should not be the same"):
        dist.send(torch.ones(1), rank)  # torch refuses
    backend = world._get_backend(torch.device("cpu"))
    sent, got = torch.arange(200_000.0), torch.empty(200_000)
    works = [backend.send([sent], rank, 0), backend.recv([got], rank, 0)]
    for work in works:
        work.wait()
    assert torch.equal(got, sent)


def test_messages_and_collectives_do_not_wait_for_each_other(
    world: dist.ProcessGroup, rank: int
) -> None:
    x = torch.ones(1000)
    pending = dist.all_reduce(x, async_op=True) if rank == 0 else None
    if rank == 0:
        dist.send(torch.ones(1), 1)  # rank 1 joins the collective after this
    elif rank == 1:
        dist.recv(torch.empty(1), 0)
    pending = pending or dist.all_reduce(x, async_op=True)
    pending.wait()
    assert bool((x == NUM_RANKS).all())


# ---- objects


def test_large_objects(world: dist.ProcessGroup, rank: int) -> None:
    mine = {"rank": rank, "bytes": bytes([rank]) * (3_000_000 * (rank + 1))}
    gathered: list[Any] = [None] * NUM_RANKS
    dist.all_gather_object(gathered, mine)
    assert [len(of["bytes"]) for of in gathered] == [3_000_000 * (r + 1) for r in range(NUM_RANKS)]
    assert all(of["bytes"][-1] == of["rank"] for of in gathered)
    collected: list[Any] | None = [None] * NUM_RANKS if rank == 2 else None
    dist.gather_object(rank, collected, dst=2)
    assert collected == (list(range(NUM_RANKS)) if rank == 2 else None)
    part: list[Any] = [None]
    dist.scatter_object_list(part, [f"for {r}" for r in range(NUM_RANKS)] if rank == 1 else None, 1)
    assert part == [f"for {rank}"]
    if rank == 0:
        dist.send_object_list([mine, "text"], dst=3)
    elif rank == 3:
        received: list[Any] = [None, None]
        dist.recv_object_list(received, src=0)
        assert received[0]["rank"] == 0
        assert received[1] == "text"
