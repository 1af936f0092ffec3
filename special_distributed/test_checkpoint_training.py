"""What a checkpoint holds beside the model: data position, random streams, groups; its export."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from primitives.checkpoint import FSDPCheckpointManager
from primitives.errors import CheckpointCorrupt
from special_distributed.checkpoint_runs import (
    FSDP1_WARNINGS,
    Wrap,
    assert_same_bits,
    ddp,
    fsdp1,
    fsdp2,
    make_optimizer,
    make_run,
    name_of,
)
from special_distributed.test_fsdp_ckpt import qwen2, wrap_fsdp2

pytestmark = FSDP1_WARNINGS


class Numbers(torch.utils.data.Dataset[int]):
    """Samples that are their own index."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> int:
        return index


def make_loader(rank: int, num_ranks: int) -> StatefulDataLoader[int]:
    data = Numbers()
    sampler = StatefulDistributedSampler(data, num_ranks, rank, shuffle=True, seed=5)
    return StatefulDataLoader(data, batch_size=2, sampler=sampler)


def gathered(batches: list[torch.Tensor], group: dist.ProcessGroup) -> list[int]:
    """The samples of all ranks, sorted."""
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, [int(x) for batch in batches for x in batch], group=group)
    return sorted(sample for part in parts for sample in part)


@pytest.mark.parametrize("num_after", [4, 2])
def test_every_sample_is_seen_once(num_after: int, folder: Path, rank: int) -> None:
    groups = {num: dist.new_group(list(range(num))) for num in (2, 4)}
    loader = make_loader(rank, 4)
    batches = iter(loader)
    seen = gathered([next(batches) for _ in range(3)], groups[4])
    manager = FSDPCheckpointManager(folder, nn.Linear(2, 2), data_loader=loader)
    torch.manual_seed(0)  # one model on all ranks
    manager = FSDPCheckpointManager(folder, nn.Linear(2, 2), data_loader=loader)
    manager.save(3)
    rest = gathered(list(batches), groups[4])
    assert sorted(seen + rest) == list(range(48))

    def reshard(states: list[Any]) -> dict[str, Any]:
        """As many samples as all ranks have seen, cut among the new ranks."""
        state: dict[str, Any] = copy.deepcopy(states[0])
        sampler = state["_sampler_iter_state"]
        total = sum(s["_sampler_iter_state"]["samples_yielded"] for s in states)
        assert total % num_after == 0
        sampler["samples_yielded"] = sampler["sampler_state"]["yielded"] = total // num_after
        state["_num_yielded"] = state["_sampler_iter_yielded"] = total // num_after // 2
        return state

    if rank < num_after:
        group = groups[num_after]
        loader = make_loader(rank, num_after)
        manager = FSDPCheckpointManager(
            folder, nn.Linear(2, 2), data_loader=loader, process_group=group
        )
        if num_after != 4:
            with pytest.raises(ValueError, match="states of 4 ranks, expected 2; pass reshard"):
                manager.load()
        manager.load(reshard_data=reshard)
        assert gathered(list(loader), group) == rest
    dist.barrier()


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), np.random.rand()]


def test_random_streams(folder: Path, rank: int) -> None:
    """Equal on the same ranks; on fewer, new ones, apart from each other and the same each time."""
    pair = dist.new_group([0, 1])
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(rank)
    manager = FSDPCheckpointManager(folder, model)
    manager.save(1)
    expected = draws()
    manager.load()
    assert draws() == expected
    if rank < 2:
        resized = FSDPCheckpointManager(folder, model, process_group=pair)
        runs = []
        for _ in range(2):
            resized.load()
            runs.append(draws())
        assert runs[0] == runs[1]
        streams: list[Any] = [None, None]
        dist.all_gather_object(streams, (expected, runs[0]), group=pair)
        values = [value for stream in streams for part in stream for value in part]
        assert len(set(values)) == len(values)
    dist.barrier()


def test_other_groups_are_refused(folder: Path, rank: int, world: dist.ProcessGroup) -> None:
    run = make_run(fsdp2, world, seed=1)
    run.update(0)
    FSDPCheckpointManager(folder, *run).save(1)
    state = dict(run.optimizer.state)

    joined = torch.optim.AdamW(run.model.parameters())
    with pytest.raises(ValueError, match=r"group 0: 'embedding.weight' was saved with .* equal"):
        FSDPCheckpointManager(folder, run.model, joined).load()
    assert not joined.state
    few = torch.optim.AdamW([run.model.get_parameter("norm.bias")])
    with pytest.raises(ValueError, match=r"parameter 'embedding.weight' is only in the checkpoint"):
        FSDPCheckpointManager(folder, run.model, few).load()
    stranger = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="group 0: 1 parameters are not the model's"):
        FSDPCheckpointManager(folder, run.model, stranger).save(2)
    swapped = make_optimizer(run.model, swap=True)
    schedule = torch.optim.lr_scheduler.ConstantLR(run.optimizer)
    FSDPCheckpointManager(folder, *run, schedule).save(2)
    schedule = torch.optim.lr_scheduler.ConstantLR(swapped)
    with pytest.raises(ValueError, match="lr scheduler: its learning rates belong to"):
        FSDPCheckpointManager(folder, run.model, swapped, schedule).load(2)
    sgd = torch.optim.SGD(run.optimizer.param_groups, momentum=0.9)
    with pytest.raises(ValueError, match=r"only in the checkpoint \['optimizer/state"):
        FSDPCheckpointManager(folder, run.model, sgd).load(1)
    assert not sgd.state
    FSDPCheckpointManager(folder, *run).load(1)
    for parameter, kinds in run.optimizer.state.items():
        assert_same_bits(kinds, state[parameter])


@pytest.mark.parametrize("version", [1, 2])
def test_a_rank_without_elements(version: int, folder: Path, rank: int) -> None:
    """Two elements on four ranks: some hold none, and FSDP1 gives those no moments."""
    torch.manual_seed(rank * version)
    model: nn.Module = nn.Linear(2, 1, bias=False)
    if version == 1:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    manager = FSDPCheckpointManager(folder, model, optimizer)

    def update() -> list[Any]:
        model(torch.tensor([1.0, 2.0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        kinds = [
            (kind, getattr(value, "to_local", lambda value=value: value)().tolist())
            for moments in optimizer.state.values()
            for kind, value in moments.items()
        ]
        shards = [getattr(p, "to_local", lambda p=p: p)().tolist() for p in model.parameters()]
        return [kinds if any(map(len, shards)) else [], shards]

    update()
    manager.save(1)
    expected = update()
    manager.load()
    assert update() == expected


@pytest.mark.parametrize("wrap", [fsdp1, fsdp2, ddp], ids=name_of)
def test_export(wrap: Wrap, folder: Path, rank: int, world: dist.ProcessGroup) -> None:
    run = make_run(wrap, world, seed=1)
    run.update(0)
    expected = run.full(world)["model"]
    manager = FSDPCheckpointManager(folder / "checkpoints", *run)
    manager.save(1)
    assert manager.export_hf(folder / "one") == ["model.safetensors"]
    assert_same_bits(load_file(folder / "one" / "model.safetensors"), expected)
    files = manager.export_hf(folder / "many", 1, max_shard_nbytes=300)
    assert len(files) > 2
    loaded = {k: v for name in files for k, v in load_file(folder / "many" / name).items()}
    assert_same_bits(loaded, expected)
    with pytest.raises(ValueError, match="many is not empty"):
        manager.export_hf(folder / "many")
    dist.barrier()
    if rank == 0:
        path = folder / "checkpoints" / "iter_0000001" / "shard_00000.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match="shard_00000"):
        manager.export_hf(folder / "none")
    assert not (folder / "none").exists()


def test_export_loads_into_transformers(folder: Path, rank: int, world: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    model = qwen2().bfloat16()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    manager = FSDPCheckpointManager(folder / "checkpoints", wrap_fsdp2(model))
    manager.save(1)
    manager.export_hf(folder / "hf", max_shard_nbytes=50_000)
    loaded = type(model).from_pretrained(folder / "hf", dtype=torch.bfloat16)
    assert_same_bits(dict(loaded.state_dict()), expected)
