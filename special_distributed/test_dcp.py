"""torch.distributed.checkpoint: what was saved on four ranks loads on four, two and one."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from special_distributed.exact_training import NUM_RANKS, batch, fill, loss, mlp


@pytest.fixture
def folder(world: dist.ProcessGroup, rank: int) -> Iterator[Path]:
    """One empty folder, the same on every rank."""
    with tempfile.TemporaryDirectory() as mine:
        shared = [mine]
        dist.broadcast_object_list(shared, src=0)
        yield Path(shared[0])
        dist.barrier()


def trained(mesh: DeviceMesh, seed: int, step: int | None = None) -> tuple[nn.Module, Any]:
    """A sharded model and its Adam optimizer, after a step when one is named."""
    model = fully_shard(mlp(seed), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if step is not None:
        loss(model, *batch(step, mesh.get_local_rank())).backward()
        optimizer.step()
    return model, optimizer


def full_state(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the state by its path, gathered."""
    flat: dict[str, torch.Tensor] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}.{key}", inner)
        elif isinstance(value, torch.Tensor):
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            flat[path] = full.clone()

    walk("", dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))
    return flat


def state_to_load(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "step": 0}


def load(model: nn.Module, optimizer: Any, folder: Path, group: Any = None) -> int:
    state = state_to_load(model, optimizer)
    dcp.load(state, checkpoint_id=folder, process_group=group)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    step = state["step"]
    assert isinstance(step, int)
    return step


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert len(expected) > 8  # parameters, both moments, steps
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("asynchronous", [False, True], ids=["save", "async_save"])
def test_save_on_four_load_on_four_and_two(
    world: dist.ProcessGroup, rank: int, folder: Path, asynchronous: bool
) -> None:
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    model, optimizer = trained(mesh, seed=0, step=0)
    saved = full_state(model, optimizer)
    state = {**state_to_load(model, optimizer), "step": 7}
    if asynchronous:
        # It communicates from a thread of its own, so it needs a group of its own.
        pending = dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group())
        loss(model, *batch(1, rank)).backward()
        optimizer.step()  # what comes after the call is not saved
        pending.result()
    else:
        dcp.save(state, checkpoint_id=folder)

    model, optimizer = trained(mesh, seed=5, step=1)
    assert load(model, optimizer, folder) == 7
    assert_same(full_state(model, optimizer), saved)

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[rank // 2]
    half = DeviceMesh.from_group(pair, "cpu")
    model, optimizer = trained(half, seed=6, step=1)
    assert load(model, optimizer, folder, pair) == 7
    assert_same(full_state(model, optimizer), saved)

    if rank == 0:
        alone = {"model": mlp(seed=7).state_dict()}
        dcp.load(alone, checkpoint_id=folder, no_dist=True)
        for name, tensor in alone["model"].items():
            assert torch.equal(tensor, saved[f".model.{name}"]), name


def test_plain_tensors_are_saved_once(world: dist.ProcessGroup, rank: int, folder: Path) -> None:
    module = fill(nn.Linear(3, 5), seed=1)
    dcp.save({"module": module.state_dict()}, checkpoint_id=folder)
    other = {"module": fill(nn.Linear(3, 5), seed=2).state_dict()}
    dcp.load(other, checkpoint_id=folder)
    for name, tensor in module.state_dict().items():
        assert torch.equal(other["module"][name], tensor)
