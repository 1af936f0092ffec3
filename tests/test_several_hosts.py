"""Groups over several hosts: layouts, the whole surface, faults, and network namespaces as hosts.

The bits of every collective over several hosts are in test_backend_bits.py.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import (
    WORKER,
    ProcessRanks,
    ThreadRanks,
    leftovers,
    run_threads,
    small_tmpfs,
)
from test_backend_bits import assert_bits, draw

from primitives import reference
from primitives.collectives import all_gather_flat, reduce_scatter_flat
from primitives.communicator import Communicator
from primitives.errors import CollectiveError, CollectiveMismatch, CollectiveTimeout, PeerLost

# ---- the whole of torch.distributed, as a program of four ranks


def surface() -> None:
    """Every operation of torch.distributed, checked against what it means."""
    rank, n = dist.get_rank(), dist.get_world_size()
    xs = [draw((7, 33), torch.float32, r) for r in range(n)]
    x = xs[rank].clone()
    dist.all_reduce(x)
    assert_bits(x, reference.all_reduce(xs)[0])

    full = torch.empty(n * 231)
    all_gather_flat(full, xs[rank].view(-1))
    assert_bits(full.view(n, 7, 33), torch.stack(xs))
    uneven = [torch.empty(r, dtype=torch.int64) for r in range(n)]
    dist.all_gather(uneven, torch.full((rank,), rank))
    assert [t.tolist() for t in uneven] == [[r] * r for r in range(n)]
    shard = torch.empty(231)
    reduce_scatter_flat(shard, torch.stack([xs[rank].view(-1)] * n).view(-1))
    assert_bits(shard, reference.all_reduce(xs)[0].view(-1))

    for root in range(n):
        data = torch.full((3,), float(rank))
        dist.broadcast(data, root)
        assert data.tolist() == [root] * 3
        data = torch.full((3,), 2**rank, dtype=torch.int32)
        dist.reduce(data, root)
        assert data.tolist() == [2**n - 1 if rank == root else 2**rank] * 3
        gathered = [torch.empty(1) for _ in range(n)] if rank == root else None
        dist.gather(torch.tensor([float(rank)]), gathered, root)
        assert gathered is None or [t.item() for t in gathered] == list(range(n))
        parts = [torch.tensor([r, root]) for r in range(n)] if rank == root else None
        part = torch.empty(2, dtype=torch.int64)
        dist.scatter(part, parts, root)
        assert part.tolist() == [rank, root]

    received = torch.empty(n * rank, dtype=torch.int64)
    sent = torch.cat([torch.full((s,), 10 * rank + s) for s in range(n)])
    dist.all_to_all_single(received, sent, [rank] * n, list(range(n)))
    assert received.tolist() == [10 * r + rank for r in range(n) for _ in range(rank)]
    outs = [torch.empty(2) for _ in range(n)]
    dist.all_to_all(outs, [torch.tensor([rank, s]).float() for s in range(n)])
    assert [t.tolist() for t in outs] == [[r, rank] for r in range(n)]

    objects: list[Any] = [None] * n
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(n)]
    news = ["from 1"] if rank == 1 else [None]
    dist.broadcast_object_list(news, 1)
    assert news == ["from 1"]

    ones = [torch.ones(1000) for _ in range(5)]
    for work in [dist.all_reduce(x, async_op=True) for x in ones]:
        work.wait()

    assert all(x.eq(n).all() for x in ones)

    messages(rank, n)

    for ranks in ([0, n - 1], [n - 1, 1, 0], list(range(n))):
        group = dist.new_group(ranks, sort_ranks=False)
        if rank in ranks:
            data = torch.tensor([rank])
            dist.all_reduce(data, group=group)
            assert data.item() == sum(ranks)
            dist.barrier(group)
    half = dist.group.WORLD.split_group(list(range(rank % 2, n, 2)))
    data = torch.tensor([rank])
    half.allreduce([data]).wait()
    assert data.item() == sum(range(rank % 2, n, 2))
    dist.barrier()


def messages(rank: int, n: int) -> None:
    """Point to point: all pairs with tags out of order, any source, batches."""
    sends = [
        dist.isend(torch.full((4,), 100 * tag + rank), peer, tag=tag)
        for peer in range(n)
        for tag in (1, 2)
        if peer != rank
    ]
    for tag in (2, 1):
        for peer in range(n):
            if peer != rank:
                data = torch.empty(4, dtype=torch.int64)
                dist.recv(data, peer, tag=tag)
                assert data.tolist() == [100 * tag + peer] * 4
    for work in sends:
        work.wait()
    if rank == 0:
        sources = []
        for _ in range(n - 1):
            data = torch.empty(70_000)
            sources.append(dist.recv(data, tag=9))
            assert data.unique().tolist() == [sources[-1]]
        assert sorted(sources) == list(range(1, n))
    else:
        dist.send(torch.full((70_000,), float(rank)), 0, tag=9)
    right, left = torch.tensor([rank]), torch.empty(1, dtype=torch.int64)
    batch = [
        dist.P2POp(dist.isend, right, (rank + 1) % n),
        dist.P2POp(dist.irecv, left, (rank - 1) % n),
    ]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    assert left.item() == (rank - 1) % n


def join(hosts: str, timeout_s: float = 20.0) -> tuple[int, int]:
    """In a rank of ProcessRanks, on the host that ``hosts`` names: init_process_group."""
    import primitives.backend

    primitives.backend.register()
    rank, world_size = int(os.environ["TEST_RANK"]), int(os.environ["TEST_WORLD_SIZE"])
    os.environ["PRIMITIVES_HOST_ID"] = hosts[rank]
    store: dist.Store
    if address := os.environ.get("TEST_ADDRESS"):
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(address, 29413, world_size, rank == 0, timeout)
    else:
        store = dist.FileStore(os.environ["TEST_STORE"], world_size)
    dist.init_process_group(
        "primitives",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return rank, world_size


def play_surface(hosts: str) -> None:
    rank, _ = join(hosts)
    surface()
    dist.destroy_process_group()
    print(f"rank {rank} is through")


def test_everything_torch_distributed_offers(tmp_path: Path) -> None:
    hosts = "abbc"
    ranks = ProcessRanks("test_several_hosts:play_surface", 4, tmp_path, args=(hosts,)).start()
    for rank, (code, output) in enumerate(ranks.wait()):
        assert code == 0, output
        assert f"rank {rank} is through" in output
    assert ranks.leftovers() == []


# ---- network namespaces: two hosts that share nothing but a cable


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the ip command (iproute2)")
    a, b = f"primitives-{os.getpid()}-a", f"primitives-{os.getpid()}-b"
    commands = [
        f"ip netns add {a}",
        f"ip netns add {b}",
        f"ip link add cable netns {a} type veth peer name cable netns {b}",
        *(
            f"ip -n {name} {rest}"
            for name, host in ((a, 1), (b, 2))
            for rest in (
                f"addr add 10.99.7.{host}/24 dev cable",
                "link set cable up",
                "link set lo up",
            )
        ),
    ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if "ermi" in done.stderr:  # Operation not permitted, Permission denied
                pytest.skip(f"this container may not make network namespaces: {done.stderr}")
            assert done.returncode == 0, (command, done.stderr)
        yield a, b
    finally:
        for name in (a, b):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_in_namespaces(target: str, namespaces: tuple[str, str], hosts: str, *args: str) -> Any:
    processes = []
    for rank, host in enumerate(hosts):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TEST_RANK": str(rank),
            "TEST_WORLD_SIZE": str(len(hosts)),
            "TEST_ADDRESS": "10.99.7.1",
        }
        inside = ["ip", "netns", "exec", namespaces["ab".index(host)]]
        python = [sys.executable, "-c", WORKER, os.getcwd(), target]
        processes.append(
            subprocess.Popen(
                [*inside, *python, hosts, *args],
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    return processes


def test_two_network_namespaces_are_two_hosts() -> None:
    with two_namespaces() as namespaces:
        processes = start_in_namespaces("test_several_hosts:play_surface", namespaces, "aabb")
        try:
            for process in processes:
                output, _ = process.communicate(timeout=90)
                assert process.returncode == 0, output
        finally:
            for process in processes:
                process.kill()
        assert [name for process in processes for name in leftovers(process.pid)] == []


# ---- faults


def play_fault(hosts: str, fault: str, victim: str) -> None:
    rank, n = join(hosts, timeout_s=3.0)
    dist.barrier()
    begin = time.monotonic()
    try:
        if rank == int(victim):
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "late":
                time.sleep(6)
            if fault == "abort":
                time.sleep(0.5)
                dist.group.WORLD.abort()
            if fault == "differ":
                dist.all_reduce(torch.ones(5, dtype=torch.int64))
        if fault == "message" and rank in (0, n - 1):
            if rank == 0:
                dist.send(torch.ones(3), n - 1)
            else:
                dist.recv(torch.ones(4), 0)
        dist.all_reduce(torch.ones(5))
        print("no error", flush=True)
    except RuntimeError as error:
        print(type(error).__name__, f"{time.monotonic() - begin:.1f} s", error, flush=True)
    os._exit(0)  # not through the exit handlers, which are not what is tested


FAULTS = [
    ("kill", "PeerLost", 3.0, "aabb", 2),
    ("kill", "PeerLost", 3.0, "aabb", 3),  # which speaks for no host
    ("late", "CollectiveTimeout", 6.0, "abbc", 1),
    ("abort", "PeerLost", 3.0, "aabb", 3),
    ("differ", "CollectiveMismatch", 3.0, "aabb", 2),
    ("message", "CollectiveMismatch", 3.0, "aabb", 3),
]


@pytest.mark.parametrize(("fault", "error", "limit_s", "hosts", "victim"), FAULTS)
def test_a_fault_is_an_error_on_every_host(
    fault: str, error: str, limit_s: float, hosts: str, victim: int, tmp_path: Path
) -> None:
    args = (hosts, fault, str(victim))
    ranks = ProcessRanks("test_several_hosts:play_fault", 4, tmp_path, args=args).start()
    for rank, (_, output) in enumerate(ranks.wait()):
        if rank == victim and fault in ("kill", "late"):
            continue
        assert error in output, (rank, output)
        took_s = float(output.split(error, 1)[1].split()[0])
        assert took_s < limit_s, output
        named = f"rank {victim}" if fault != "message" else "rank 3 called recv(float32, 16 bytes"
        if fault in ("kill", "differ", "message"):
            assert named in output, output
        if fault == "differ":
            site = r"\S*tests/test_several_hosts.py:\d+ in play_fault"
            one = rf"rank {victim}: all_reduce\(sum, int64, numel 5\) at {site}"
            assert re.search(rf"rank 0, 1, 3: all_reduce\(.*?\) at {site}; {one}", output), output
    assert ranks.leftovers() == []


def test_a_missing_rank_is_named_while_the_group_is_made() -> None:
    store = dist.HashStore()
    with pytest.raises(CollectiveTimeout, match=r"rank 1, rank 2 did not come within 300 ms"):
        Communicator.from_store(store, 0, 3, timeout_s=0.3)


# ---- the Communicator, and threads


def test_a_communicator_over_processes(tmp_path: Path) -> None:
    ranks = ProcessRanks(
        "test_several_hosts:play_communicator", 4, tmp_path, args=("abba",)
    ).start()
    for code, output in ranks.wait():
        assert code == 0, output


def play_communicator(hosts: str) -> None:
    rank = int(os.environ["TEST_RANK"])
    os.environ["PRIMITIVES_HOST_ID"] = hosts[rank]
    path = os.environ["TEST_STORE"]
    with Communicator.from_file(path, rank, 4, timeout_s=20) as comm:
        data = np.full(100_001, 2**rank, np.int16)
        comm.all_reduce(data)
        assert (data == 15).all()
        part = comm.split(rank // 2)
        assert part is not None
        with part:
            part.all_reduce(data)
            assert (data == 30).all()


@settings(max_examples=20, deadline=None)
@given(st.text("abc", min_size=2, max_size=7), st.sampled_from(["float32", "bfloat16"]))
def test_the_bits_do_not_depend_on_where_the_ranks_are(hosts: str, dtype: str) -> None:
    n = len(hosts)
    xs = [draw((101,), getattr(torch, dtype), r) for r in range(n)]
    ranks = ThreadRanks(n, hosts=hosts)

    def call(backend: Any, rank: int) -> torch.Tensor:
        x = xs[rank].clone()
        backend.allreduce([x], dist.AllreduceOptions()).wait()
        return x

    for got in ranks(call):
        assert_bits(got, reference.all_reduce(xs)[0])
    ranks.close()


def test_ranks_in_threads_see_the_same_mismatch() -> None:
    ranks = ThreadRanks(3, hosts="aba")

    def call(backend: Any, rank: int) -> None:
        if rank == 1:
            backend.barrier(dist.BarrierOptions()).wait()
        else:
            backend.allreduce([torch.ones(2)], dist.AllreduceOptions()).wait()

    for error in ranks.errors(call):
        assert isinstance(error, CollectiveMismatch)
        assert "rank 1: barrier" in str(error)
        assert "rank 0, 2: all_reduce(sum, float32, numel 2) at " in str(error)
    ranks.close()


def test_symmetric_memory_is_had_on_every_host_or_on_none() -> None:
    ranks = ThreadRanks(3, hosts="aba")
    for x in ranks(lambda backend, rank: backend.empty([5, 2], torch.float32).fill_(rank)):
        assert x.shape == (5, 2)

    def call(backend: Any, rank: int) -> None:
        backend.empty([5 + rank], torch.float32)

    for error in ranks.errors(call):
        assert isinstance(error, CollectiveMismatch)
        assert "rank 1: empty" in str(error)
    ranks.close()


def test_symmetric_memory_without_room_on_one_host_is_an_error_on_all(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, "24m") as folder:  # which both hosts use: one rank has no room
        ranks = ThreadRanks(4, hosts="aabb", shm_dir=folder)
        for error in ranks.errors(lambda backend, rank: backend.empty([2**23], torch.uint8)):
            assert isinstance(error, CollectiveError), error
            assert "has no room for 8388608 bytes of symmetric memory" in str(error)
        for x in ranks(lambda backend, rank: backend.empty([2**20], torch.uint8).fill_(1)):
            assert x.sum() == 2**20
        ranks.close()


def test_a_host_that_left_is_named() -> None:
    ranks = ThreadRanks(3, hosts="aab")

    def call(backend: Any, rank: int) -> None:
        if rank == 2:
            backend.shutdown()
        else:
            backend.barrier(dist.BarrierOptions()).wait()

    errors = ranks.errors(call)
    assert errors[2] is None
    for error in errors[:2]:
        assert isinstance(error, PeerLost)
        assert "rank 2 on host 'b'" in str(error)
    run_threads(2, lambda r: ranks.backends[r].shutdown())
