"""FSDP1, FSDP2 and HSDP equal one process, bit for bit; see [Note: exact arithmetic]."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from special_distributed.exact_training import (
    NUM_RANKS,
    assert_same_tensors,
    batch,
    loss,
    mlp,
    sgd,
    train_alone,
)

NUM_STEPS = 3


@pytest.mark.parametrize(
    "strategy",
    [
        ShardingStrategy.FULL_SHARD,
        ShardingStrategy.SHARD_GRAD_OP,
        ShardingStrategy.NO_SHARD,
        ShardingStrategy.HYBRID_SHARD,
    ],
    ids=lambda strategy: strategy.name,
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp1(world: dist.ProcessGroup, rank: int, strategy: ShardingStrategy) -> None:
    options: dict[str, Any] = {}
    if strategy is ShardingStrategy.HYBRID_SHARD:
        options["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    model = FullyShardedDataParallel(
        mlp(),
        sharding_strategy=strategy,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
        **options,
    )
    optimizer = sgd(model)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss(model, *batch(step, rank)).backward()
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        actual = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for name, p in model.named_parameters()
        }
    assert_same_tensors(actual, dict(train_alone(NUM_STEPS).named_parameters()))


def shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def train_fsdp2(model: nn.Sequential, rank: int) -> dict[str, torch.Tensor]:
    optimizer = sgd(model)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss(model, *batch(step, rank)).backward()
        optimizer.step()
    return {name: p.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["FSDP", "HSDP"])
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2(world: dist.ProcessGroup, rank: int, shape: tuple[int, ...], reshard: bool) -> None:
    names = ("shard",) if len(shape) == 1 else ("copy", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = shard(mlp(), mesh=mesh, reshard_after_forward=reshard)
    actual = train_fsdp2(model, rank)
    assert_same_tensors(actual, dict(train_alone(NUM_STEPS).named_parameters()))


def test_fsdp2_divides_by_a_factor_of_its_own(world: dist.ProcessGroup, rank: int) -> None:
    """A factor other than the number of ranks makes torch ask for PREMUL_SUM."""
    model = shard(mlp(), mesh=init_device_mesh("cpu", (NUM_RANKS,)))
    model.set_gradient_divide_factor(2.0)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.set_gradient_divide_factor(2.0)
    loss(model, *batch(0, rank)).backward()
    alone = mlp()
    for r in range(NUM_RANKS):
        (loss(alone, *batch(0, r)) / 2).backward()
    actual = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_same_tensors(actual, {name: p.grad for name, p in alone.named_parameters()})


def test_fsdp2_in_bfloat16(world: dist.ProcessGroup, rank: int) -> None:
    """Parameters in {-1, -0.5, .., 1} are bfloat16 as they are; gradients are summed in float32."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(mlp(), mesh=init_device_mesh("cpu", (NUM_RANKS,)), mp_policy=precision)
    x, weights = batch(0, rank)
    loss(model, x.bfloat16(), weights.bfloat16()).backward()
    alone = mlp()
    for r in range(NUM_RANKS):
        half = mlp().bfloat16()
        loss(half, *(tensor.bfloat16() for tensor in batch(0, r))).backward()
        for p, q in zip(alone.parameters(), half.parameters(), strict=True):
            p.grad = (0 if p.grad is None else p.grad) + q.grad.float() / NUM_RANKS
    actual = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_same_tensors(actual, {name: p.grad for name, p in alone.named_parameters()})
