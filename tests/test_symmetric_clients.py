"""Users of symmetric memory: primitives.empty, FSDP2's allocator, torch's symm_mem."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import ProcessRanks, init
from torch import Tensor, nn

import primitives
from primitives.backend import native
from primitives.collectives import all_gather, all_gather_flat, reduce_scatter

NUMEL = 40_000


def zero_copy_calls() -> int:
    return native(None, "test").num_zero_copy


def fused_from_python(rank: int, world_size: int) -> None:
    fulls = [primitives.empty(*shape, dtype=torch.bfloat16) for shape in ((7, 3000), (5,))]
    shards = [  # rows 2 2 2 1 and 2 2 1 0
        torch.full(((2, 2, 2, 1)[rank], 3000), float(rank)),
        torch.full(((2, 2, 1, 0)[rank],), float(rank)),
    ]
    before = zero_copy_calls()
    work = all_gather(shards, fulls, async_op=True)
    assert work is not None
    work.wait()
    assert zero_copy_calls() == before + 1
    assert fulls[0][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert fulls[1].tolist() == [0, 0, 1, 1, 2]
    summed = [torch.ones_like(x) for x in shards]
    squares = torch.empty(2)
    assert reduce_scatter(fulls, summed, factor=0.5, accumulate=True, squares=squares) is None
    for shard, total in zip(shards, summed, strict=True):
        assert torch.equal(total, 1 + 2 * shard)
    counts = [[10, 0, 20, 3]]
    whole = primitives.empty(33)
    all_gather([torch.full((counts[0][rank],), float(rank))], [whole], numels=counts)
    assert whole.tolist() == [0.0] * 10 + [2.0] * 20 + [3.0] * 3
    assert not primitives.empty(2, 2, symmetric=False).is_shared()


def fsdp2(rank: int, world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def train(from_group: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(130, 257), nn.Tanh(), nn.Linear(257, 130))
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        if from_group:
            model.set_allocate_memory_from_process_group_for_comm(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = zero_copy_calls()
        for step in range(3):
            torch.manual_seed(10 * step + rank)
            model(torch.randn(8, 130)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        parameters = [p.detach().full_tensor() for p in model.parameters()]
        return parameters, zero_copy_calls() - before

    ordinary, num_ordinary = train(from_group=False)
    symmetric, num_symmetric = train(from_group=True)
    assert all(map(torch.equal, ordinary, symmetric))
    assert (num_ordinary, num_symmetric >= 6) == (0, True), (num_ordinary, num_symmetric)


def symm_mem(rank: int, world_size: int) -> None:
    import torch.distributed._symmetric_memory as symm_mem

    x = symm_mem.empty(NUMEL, dtype=torch.float32, device="cpu").fill_(rank)
    handle = symm_mem.rendezvous(x, dist.group.WORLD)
    assert (handle.rank, handle.world_size) == (rank, world_size)
    handle.barrier(channel=0)
    peers = [handle.get_buffer(r, (NUMEL,), torch.float32) for r in range(world_size)]
    assert [int(peer[-1]) for peer in peers] == list(range(world_size))
    handle.barrier(channel=1)
    peers[(rank + 1) % world_size][0] = 100 + rank  # one-sided
    handle.put_signal((rank + 1) % world_size, 2)
    handle.wait_signal((rank - 1) % world_size, 2)
    assert x[0] == 100 + (rank - 1) % world_size
    handle.barrier(channel=3)
    before = zero_copy_calls()
    dist.all_reduce(x)
    full = torch.empty(world_size * NUMEL)
    all_gather_flat(full, x)
    assert zero_copy_calls() == before + 2
    assert full[-1] == sum(range(world_size))
    # A group of some of the ranks, on memory of the world.
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    y = symm_mem.empty(4, dtype=torch.int64, device="cpu").fill_(rank)
    pair = symm_mem.rendezvous(y, pairs[rank // 2])
    pair.barrier(channel=0)
    other = pair.get_buffer(1 - rank % 2, (4,), torch.int64)
    assert other.tolist() == [rank ^ 1] * 4
    with pytest.raises(Exception, match="passed its deadline of 50 ms"):
        pair.wait_signal(1 - rank % 2, 1, timeout_ms=50)
    pair.barrier(channel=0)


def test_other_backends_are_refused() -> None:
    class Gloo:
        def name(self) -> str:
            return "gloo"

    class Group:
        def _get_backend(self, device: torch.device) -> Gloo:
            return Gloo()

    message = "expected a process group of the primitives backend, got gloo"
    for call in (
        lambda group: primitives.empty(3, group=group),
        lambda group: all_gather([], [], group=group),
        lambda group: reduce_scatter([], [], group=group),
    ):
        with pytest.raises(ValueError, match=message):
            call(Group())


CLIENTS = {"fused": fused_from_python, "fsdp2": fsdp2, "symm_mem": symm_mem}


def run(name: str) -> None:
    rank, world_size = init()
    CLIENTS[name](rank, world_size)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CLIENTS)
def test_client(name: str, tmp_path: Path) -> None:
    ranks = ProcessRanks("test_symmetric_clients:run", 4, tmp_path, (name,)).start()
    for code, output in ranks.wait(150):
        assert code == 0, output
    assert ranks.leftovers() == []
