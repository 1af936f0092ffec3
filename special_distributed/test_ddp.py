"""DDP and ZeRO-1 equal one process, bit for bit; see [Note: exact arithmetic]."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from primitives import reference
from special_distributed.exact_training import (
    LR,
    NUM_RANKS,
    assert_same_parameters,
    assert_same_tensors,
    batch,
    loss,
    mean_loss,
    mlp,
    sgd,
    train_alone,
)


def test_one_process_is_exact() -> None:
    """What [Note: exact arithmetic] rests on: float64, with 29 bits more, has the same values."""
    wide = {name: p.float() for name, p in train_alone(4, torch.float64).named_parameters()}
    assert_same_tensors(dict(train_alone(4).named_parameters()), wide)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001},  # a bucket a parameter
    ],
    ids=str,
)
def test_training(world: dist.ProcessGroup, rank: int, options: dict[str, Any]) -> None:
    model = DistributedDataParallel(mlp(seed=rank), **options)  # rank 0's parameters count
    optimizer = sgd(model)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, *batch(step, rank)).backward()
        optimizer.step()
    assert_same_parameters(model.module, train_alone(3))


class Branches(nn.Module):
    """Of two branches one runs; a third layer never does."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([mlp(1), mlp(2)])
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor, which: int) -> Tensor:
        result: Tensor = self.branches[which](x)
        return result


def test_unused_parameters(world: dist.ProcessGroup, rank: int) -> None:
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    loss(lambda x: model(x, rank % 2), *batch(0, rank)).backward()
    alone = Branches()
    for r in range(NUM_RANKS):
        (loss(lambda x, r=r: alone(x, r % 2), *batch(0, r)) / NUM_RANKS).backward()
    assert_same_tensors(grads(model.module), grads(alone))
    assert model.module.never.weight.grad is None


def test_no_sync_accumulates(world: dist.ProcessGroup, rank: int) -> None:
    model = DistributedDataParallel(mlp())
    with model.no_sync():
        loss(model, *batch(0, rank)).backward()
    loss(model, *batch(1, rank)).backward()
    alone = mlp()
    for step in (0, 1):
        mean_loss(alone, step).backward()
    assert_same_tensors(grads(model.module), grads(alone))


def test_join_of_uneven_inputs(world: dist.ProcessGroup, rank: int) -> None:
    model = DistributedDataParallel(mlp())
    optimizer = sgd(model, momentum=0.0)
    with model.join():
        for step in range(1 + rank):  # rank r has r + 1 batches
            optimizer.zero_grad()
            loss(model, *batch(step, rank)).backward()
            optimizer.step()
    alone = mlp()
    optimizer = sgd(alone, momentum=0.0)
    for step in range(NUM_RANKS):
        optimizer.zero_grad()
        mean_loss(alone, step, range(step, NUM_RANKS)).backward()
        optimizer.step()
    assert_same_parameters(model.module, alone)


@pytest.mark.parametrize(
    ("hook", "dtype"),
    [
        (default_hooks.fp16_compress_hook, torch.float16),
        (default_hooks.bf16_compress_hook, torch.bfloat16),
    ],
    ids=["fp16", "bf16"],
)
def test_compression(
    world: dist.ProcessGroup, rank: int, hook: Callable[[Any, Any], Any], dtype: torch.dtype
) -> None:
    """Each rank's gradient is rounded and divided; their sum is rounded once."""

    def compress(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = hook(state, bucket)
        return future  # (torch allows the bf16 hook by its name, with NCCL alone)

    model = DistributedDataParallel(mlp())
    model.register_comm_hook(None, compress)
    loss(model, *batch(0, rank)).backward()
    compressed: list[dict[str, Tensor]] = []
    for r in range(NUM_RANKS):
        alone = mlp()
        loss(alone, *batch(0, r)).backward()
        compressed.append({name: grad.to(dtype) / NUM_RANKS for name, grad in grads(alone).items()})
    expected = {
        name: reference.reduce([of[name] for of in compressed]).float() for name in compressed[0]
    }
    assert_same_tensors(grads(model.module), expected)


def test_power_sgd(world: dist.ProcessGroup, rank: int) -> None:
    """An approximation of full rank is the gradient, up to the rounding of an orthogonalization.

    Of 8 columns of a 16 x 8 matrix, each step of Gram-Schmidt is off by a few units in the last
    place, 2^-24, amplified by the matrix's condition; 1e-3 of the largest element is far above
    that, and far below what one missing rank of four would make.
    """
    model = DistributedDataParallel(mlp())
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=16, start_powerSGD_iter=2, min_compression_rate=0
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    for step in range(4):
        model.zero_grad()
        loss(model, *batch(step, rank)).backward()
    alone = mlp()
    mean_loss(alone, 3).backward()
    for name, expected in grads(alone).items():
        error = (grads(model.module)[name] - expected).abs().max()
        assert float(error) <= 1e-3 * float(expected.abs().max()), name


def test_zero_1(world: dist.ProcessGroup, rank: int) -> None:
    model = DistributedDataParallel(mlp())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.SGD, lr=LR, momentum=0.5
    )
    for step in range(3):
        optimizer.zero_grad()
        loss(model, *batch(step, rank)).backward()
        optimizer.step()
    alone = train_alone(3)
    assert_same_parameters(model.module, alone)
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        state = optimizer.state_dict()["state"]
        assert len(state) == len(list(alone.parameters()))
        assert all(bool(entry["momentum_buffer"].isfinite().all()) for entry in state.values())


def test_sparse_gradients(world: dist.ProcessGroup, rank: int) -> None:
    """Embedding rows that only some ranks touch."""
    ids = [torch.tensor([r, r, r + 1, 9]) for r in range(NUM_RANKS)]

    def embedding() -> nn.Embedding:
        table = nn.Embedding(10, 3, sparse=True)
        with torch.no_grad():
            table.weight.copy_(torch.arange(30.0).reshape(10, 3))
        return table

    model = DistributedDataParallel(embedding())
    (model(ids[rank]) * (1 + rank)).sum().backward()
    alone = embedding()
    for r in range(NUM_RANKS):
        ((alone(ids[r]) * (1 + r)).sum() / NUM_RANKS).backward()
    grad = model.module.weight.grad
    assert grad.is_sparse
    assert torch.equal(grad.to_dense(), alone.weight.grad.to_dense())
