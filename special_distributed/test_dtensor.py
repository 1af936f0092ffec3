"""DTensor, tensor parallelism and functional collectives equal the plain tensors, bit for bit."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from special_distributed.exact_training import (
    NUM_RANKS,
    assert_same_tensors,
    batch,
    loss,
    mlp,
)

PLACEMENTS: list[Placement] = [Replicate(), Shard(0), Shard(1), Partial()]
SIZES = [(8, 12), (7, 3), (1, 5)]  # even shards, uneven ones, ranks without any


def values(*sizes: int) -> Tensor:
    """Integers, so that a sum of copies is exact."""
    numel = torch.Size(sizes).numel()
    return (torch.arange(numel, dtype=torch.float32) * 7 % 31 - 15).reshape(sizes)


def place(full: Tensor, mesh: Any, placements: list[Placement]) -> DTensor:
    """``full`` over the mesh; a partial one is held whole by one rank of its dimension."""
    sharded = [Replicate() if p.is_partial() else p for p in placements]
    local = distribute_tensor(full, mesh, sharded).to_local().clone()
    for dim, placement in enumerate(placements):
        if placement.is_partial() and mesh.get_local_rank(dim) != mesh.size(dim) - 1:
            local.zero_()
    return DTensor.from_local(
        local, mesh, placements, shape=full.shape, stride=full.stride(), run_check=False
    )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_redistribute_all_pairs(world: dist.ProcessGroup, sizes: tuple[int, int]) -> None:
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    full = values(*sizes)
    for source, target in product(PLACEMENTS, PLACEMENTS[:3]):
        moved = place(full, mesh, [source]).redistribute(mesh, [target])
        assert torch.equal(moved.to_local(), distribute_tensor(full, mesh, [target]).to_local())


def test_redistribute_on_two_dimensions(world: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    full = values(5, 6)
    for source in product(PLACEMENTS, PLACEMENTS):
        for target in ([Replicate(), Shard(1)], [Shard(0), Shard(0)], [Replicate(), Replicate()]):
            moved = place(full, mesh, list(source)).redistribute(mesh, target)
            assert torch.equal(moved.full_tensor(), full), (source, target)


def test_tensor_parallel_plan(world: dist.ProcessGroup, rank: int) -> None:
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    model = parallelize_module(mlp(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x, weights = batch(0, 0)  # the same on every rank
    x = x.requires_grad_()
    loss(model, x, weights).backward()
    alone = mlp()
    x_alone = x.detach().clone().requires_grad_()
    loss(alone, x_alone, weights).backward()
    assert torch.equal(x.grad, x_alone.grad)
    actual = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_same_tensors(actual, {name: p.grad for name, p in alone.named_parameters()})


def test_functional_collectives(world: dist.ProcessGroup, rank: int) -> None:
    xs = [values(8, 3) + r for r in range(NUM_RANKS)]
    total = torch.stack(xs).sum(0)
    mine = xs[rank]
    assert torch.equal(functional.all_reduce(mine, "sum", world), total)
    assert torch.equal(functional.all_reduce(mine, "avg", world), total / NUM_RANKS)
    assert torch.equal(functional.broadcast(mine, 2, world), xs[2])
    assert torch.equal(functional.all_gather_tensor(mine, 0, world), torch.cat(xs))
    assert torch.equal(functional.all_gather_tensor(mine, 1, world), torch.cat(xs, 1))
    assert torch.equal(
        functional.reduce_scatter_tensor(mine, "sum", 0, world), total.chunk(NUM_RANKS)[rank]
    )
    ring = [1, 2, 3, 0]  # rank i sends to ring[i]
    assert torch.equal(functional.permute_tensor(mine[0], ring, world), xs[rank - 1][0])
    assert torch.equal(
        functional.all_to_all_single(mine, None, None, world),
        torch.cat([x.chunk(NUM_RANKS)[rank] for x in xs]),
    )
    pair = [mine, mine[:4].contiguous() * 2]
    reduced = functional.all_reduce_coalesced(pair, "sum", world)
    assert torch.equal(reduced[0], total)
    assert torch.equal(reduced[1], total[:4] * 2)
    gathered = functional.all_gather_into_tensor_coalesced(pair, world)
    assert torch.equal(gathered[0], torch.cat(xs))
    assert torch.equal(gathered[1], torch.cat([x[:4] * 2 for x in xs]))
    scattered = functional.reduce_scatter_tensor_coalesced(pair, "sum", [0, 0], world)
    assert torch.equal(scattered[0], total.chunk(NUM_RANKS)[rank])
    assert torch.equal(scattered[1], (total[:4] * 2).chunk(NUM_RANKS)[rank])


def test_functional_collectives_have_gradients(world: dist.ProcessGroup, rank: int) -> None:
    """Each gradient is the transposed collective of what flows back."""
    flows = [values(32, 3) * (r + 1) for r in range(NUM_RANKS)]  # what rank r sends back

    x = values(8, 3).requires_grad_()
    gathered = functional.all_gather_tensor_autograd(x, 0, world)
    assert torch.equal(gathered.detach(), values(8, 3).repeat(NUM_RANKS, 1))
    gathered.backward(flows[rank])
    assert torch.equal(x.grad, sum(flow.chunk(NUM_RANKS)[rank] for flow in flows))

    x = values(8, 3).requires_grad_()
    parts = [flow[:2] for flow in flows]
    scattered = functional.reduce_scatter_tensor_autograd(x, "sum", 0, world)
    assert torch.equal(scattered.detach(), values(8, 3).chunk(NUM_RANKS)[rank] * NUM_RANKS)
    scattered.backward(parts[rank])
    assert torch.equal(x.grad, torch.cat(parts))

    x = values(8, 3).requires_grad_()
    rows = [2] * NUM_RANKS
    exchanged = functional.all_to_all_single_autograd(x, rows, rows, world)
    assert torch.equal(exchanged.detach(), values(8, 3).chunk(NUM_RANKS)[rank].repeat(NUM_RANKS, 1))
    exchanged.backward(flows[rank][:8])
    assert torch.equal(x.grad, torch.cat([flow[:8].chunk(NUM_RANKS)[rank] for flow in flows]))
