"""The engine on a device: everything is put where it belongs, and no bit depends on it.

On what is no GPU: tensors that say they are elsewhere, and CUDA kernels that the host plays.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from primitives import arithmetic
from primitives.checkpoint import CheckpointManager
from scenarios.engines.builtin import CPU, Trainer
from tests.canonical_emulator import emulated
from tests.emulators import build
from tests.engine_scenarios import tiny_scenario
from tests.placed_tensors import ELSEWHERE, Placed, elsewhere

FAMILIES = ("gpt", "moe", "bert")


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(family: str, device: torch.device, folder: Path) -> list[dict[str, object]]:
    """The metrics of two steps, a checkpoint, and two steps of what resumed from it."""
    scenario = tiny_scenario(1, family=family, initial_loss_scale=1024.0, lr_warmup_iters=0)
    manager = CheckpointManager(folder)
    metrics = []
    for resumed in (False, True):
        trainer = Trainer(scenario, device=device)
        if resumed:
            trainer.state.load(manager)
        trainer.gather.start()
        assert all(p.device == device for p in trainer.model.parameters())
        metrics += [trainer.train_step() for _ in range(2)]
        if not resumed:
            trainer.state.save(manager, asynchronous=False)
    return metrics


@pytest.mark.parametrize("family", FAMILIES)
def test_no_bit_depends_on_the_device(family: str, tmp_path: Path) -> None:
    with arithmetic.use("canonical"):
        expected = trained(family, CPU, tmp_path / "cpu")
    with elsewhere(), arithmetic.use("canonical"):
        actual = trained(family, ELSEWHERE, tmp_path / "elsewhere")
    assert actual == expected
    assert len({str(step["params-digest"]) for step in actual}) == len(actual)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cuda_kernels_train_the_same(family: str) -> None:
    """A step in which the emulated device computes every canonical function."""

    def step() -> dict[str, object]:
        scenario = tiny_scenario(1, family=family, initial_loss_scale=1024.0, lr_warmup_iters=0)
        trainer = Trainer(scenario)
        trainer.gather.start()
        return {**trainer.train_step()}

    expected = step()
    with emulated(build("canonical")):
        actual = step()
    assert actual == expected
    assert actual["grad-norm"] is not None


def test_a_tensor_in_the_wrong_place_is_noticed() -> None:
    with elsewhere(), arithmetic.use("canonical"):
        x = torch.ones(3, device=ELSEWHERE)
        assert isinstance(x, Placed)
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match=r"canonical\.gelu_backward: expected all tensors"):
            arithmetic.kernels.gelu_backward(x, torch.ones(3))
        with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
            x.numpy()
        assert copy.copy(x.cpu()).tolist() == [1.0, 1.0, 1.0]
