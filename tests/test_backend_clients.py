"""What torch builds on a backend: DDP, FSDP2, DTensor, DCP, objects, sub-groups, messages."""

from pathlib import Path

import torch
import torch.distributed as dist
from ranks import ProcessRanks, init
from torch import nn

from primitives.collectives import all_gather_flat, reduce_scatter_flat


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def groups_and_objects(rank: int, world_size: int) -> None:
    objects: list[object] = [None] * world_size
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank})
    assert objects == [{"rank": r, "text": "x" * r} for r in range(world_size)]
    shared = [{"from": rank}, rank]
    dist.broadcast_object_list(shared, src=1)
    assert shared == [{"from": 1}, 1]

    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    mine = pairs[rank // 2]
    x = torch.tensor([float(rank)])
    dist.all_reduce(x, group=mine)
    assert x.item() == (1.0 if rank < 2 else 5.0)
    part = dist.group.WORLD.split_group([rank % 2, rank % 2 + 2])
    x = torch.tensor([float(rank)])
    part.allreduce(x, dist.ReduceOp.MAX).wait()
    assert x.item() == (2.0 if rank % 2 == 0 else 3.0)
    works = [dist.all_reduce(torch.ones(1000), async_op=True, group=g) for g in (mine, None)]
    for work in works:
        work.wait()
        assert work.is_completed()
    future = dist.all_reduce(torch.ones(3), async_op=True).get_future()
    assert torch.equal(future.wait()[0], torch.full((3,), float(world_size)))
    coalesced(rank, world_size)
    dist.barrier()


def coalesced(rank: int, world_size: int) -> None:
    from torch.distributed.distributed_c10d import _coalescing_manager

    fulls = [torch.empty(world_size * k) for k in (1, 3)]
    with _coalescing_manager(async_ops=True) as works:
        for full in fulls:
            shard = torch.full((full.numel() // world_size,), float(rank))
            all_gather_flat(full, shard)
    works.wait()
    shards = [torch.empty(k) for k in (1, 3)]
    with _coalescing_manager():
        for full, shard in zip(fulls, shards, strict=True):
            reduce_scatter_flat(shard, full)
    for shard in shards:
        assert torch.equal(shard, torch.full_like(shard, float(rank * world_size)))
    sums = [torch.ones(2), torch.ones(5)]
    dist.all_reduce_coalesced(sums)
    assert all(torch.equal(x, torch.full_like(x, float(world_size))) for x in sums)
    lists = [[torch.empty(2), torch.empty(1)] for _ in range(world_size)]
    dist.all_gather_coalesced(lists, [torch.full((2,), float(rank)), torch.ones(1)])
    assert [x[0].tolist() for x in lists] == [[r, r] for r in range(world_size)]


def messages(rank: int, world_size: int) -> None:
    right, left = (rank + 1) % world_size, (rank - 1) % world_size
    got = torch.empty(300_000)
    mine = torch.full((300_000,), float(rank))
    ops = [dist.P2POp(dist.isend, mine, right), dist.P2POp(dist.irecv, got, left)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert torch.equal(got, torch.full_like(got, float(left)))
    if rank == 0:
        for r in range(1, world_size):
            dist.isend(torch.tensor([r]), r)  # nobody keeps the work
        seen = set()
        for _ in range(1, world_size):
            value = torch.empty(2)
            seen.add(dist.recv(value, None, tag=7))
            assert value.tolist() == [1.0, 2.0]
        assert seen == set(range(1, world_size))
    else:
        value = torch.empty(1, dtype=torch.int64)
        assert dist.recv(value, 0) == 0
        assert value.item() == rank
        dist.send(torch.tensor([1.0, 2.0]), 0, tag=7)


def ddp(rank: int, world_size: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    plain, wrapped = model(), DistributedDataParallel(model(rank))
    xs = torch.randn(world_size, 4, 6, generator=torch.Generator().manual_seed(1))
    wrapped(xs[rank]).square().sum().backward()
    grads = []
    for x in xs:
        plain.zero_grad()
        plain(x).square().sum().backward()
        grads.append([p.grad.clone() / world_size for p in plain.parameters()])
    from primitives.reference import reduce

    for i, p in enumerate(wrapped.module.parameters()):
        assert torch.equal(p.grad, reduce([g[i] for g in grads]))


def fsdp2_and_checkpoint(rank: int, world_size: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    full = model()
    sharded = model()
    fully_shard(sharded, mesh=mesh)
    xs = torch.randn(world_size, 4, 6, generator=torch.Generator().manual_seed(1))
    sharded(xs[rank]).square().sum().backward()
    grads = []
    for x in xs:
        full.zero_grad()
        full(x).square().sum().backward()
        grads.append([p.grad.clone() for p in full.parameters()])
    for i, p in enumerate(sharded.parameters()):
        mean = torch.stack([g[i] for g in grads]).mean(0)
        torch.testing.assert_close(p.grad.full_tensor(), mean, rtol=1e-5, atol=1e-6)

    state = get_model_state_dict(sharded)
    dcp.save(state, checkpoint_id=f"{folder}/checkpoint")
    other = model(5)
    fully_shard(other, mesh=mesh)
    loaded = get_model_state_dict(other)
    dcp.load(loaded, checkpoint_id=f"{folder}/checkpoint")
    for name, value in loaded.items():
        assert torch.equal(value.full_tensor(), full.state_dict()[name])

    x = torch.arange(24.0).reshape(8, 3)
    rows = distribute_tensor(x, mesh, [Shard(0)])
    assert torch.equal(rows.redistribute(mesh, [Shard(1)]).full_tensor(), x)
    partial = DTensor.from_local(x, mesh, [dist.tensor.Partial()])
    assert torch.equal(partial.redistribute(mesh, [Replicate()]).to_local(), 4 * x)
    assert torch.equal(partial.redistribute(mesh, [Shard(0)]).full_tensor(), 4 * x)


def clients(folder: str) -> None:
    rank, world_size = init()
    groups_and_objects(rank, world_size)
    messages(rank, world_size)
    ddp(rank, world_size)
    fsdp2_and_checkpoint(rank, world_size, folder)
    dist.destroy_process_group()


def test_torch_clients_run_on_the_backend(tmp_path: Path) -> None:
    ranks = ProcessRanks("test_backend_clients:clients", 4, tmp_path, (str(tmp_path),)).start()
    for code, output in ranks.wait(120):
        assert code == 0, output
    assert ranks.leftovers() == []
