"""A training run continues from a checkpoint bit for bit: FSDP1, FSDP2 and DDP on four ranks."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM

from primitives.checkpoint import CheckpointManager, FSDPCheckpointManager
from primitives.errors import CheckpointCorrupt
from primitives.random_state import random_state
from special_distributed.checkpoint_runs import FSDP1_WARNINGS, assert_same_bits

pytestmark = FSDP1_WARNINGS
VOCAB_SIZE = 150  # rows on 4 ranks: uneven shards


def qwen2(num_layers: int = 1) -> Qwen2ForCausalLM:
    """A small Qwen2 with random weights."""
    config = Qwen2Config(
        num_hidden_layers=num_layers,
        hidden_size=64,
        intermediate_size=144,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=32,
        attention_dropout=0.1,  # draws from the random generator: a replay needs its state
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config)


def wrap_fsdp1(model: torch.nn.Module) -> torch.nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def wrap_fsdp2(model: torch.nn.Module) -> torch.nn.Module:
    assert isinstance(model, Qwen2ForCausalLM)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.model.layers[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "fsdp1": wrap_fsdp1,
    "fsdp2": wrap_fsdp2,
    "ddp": DistributedDataParallel,
}


class Run(NamedTuple):
    """A training run on this rank."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def update(self) -> torch.Tensor:
        """One step on drawn tokens; returns the logits."""
        tokens = torch.randint(VOCAB_SIZE, (2, 16))
        output = self.model(input_ids=tokens, labels=tokens)
        (output.loss * (1 + random.random() + np.random.rand())).backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        logits: torch.Tensor = output.logits.detach()
        return logits

    def state(self) -> dict[str, Any]:
        """Everything of this rank that the next step depends on, copied."""
        moments = {
            f"{name}.{kind}": moment.clone()
            for name, parameter in self.model.named_parameters()
            for kind, moment in self.optimizer.state[parameter].items()
        }
        return {
            "weights": {name: p.detach().clone() for name, p in self.model.named_parameters()},
            "moments": moments,
            "schedule": self.schedule.state_dict(),
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "random": random_state(),
        }


def make_run(wrap: str, rank: int, seed: int) -> Run:
    torch.manual_seed(seed)  # equal weights on all ranks
    model = WRAPS[wrap](qwen2())
    for number, seed_generator in enumerate((torch.manual_seed, random.seed, np.random.seed)):
        seed_generator(seed * 1000 + rank * 10 + number)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return Run(model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "async"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_replay(wrap: str, asynchronous: bool, folder: Path, rank: int) -> None:
    run = make_run(wrap, rank, seed=1)
    manager = FSDPCheckpointManager(folder, *run, asynchronous=asynchronous)
    run.update()
    saved = run.state()
    reserved_nbytes = manager.checkpoints.reserved_nbytes
    assert (reserved_nbytes > 0) == asynchronous
    manager.save(1, {"consumed samples": 8})
    assert manager.checkpoints.reserved_nbytes == reserved_nbytes  # it was enough
    logits = run.update()
    manager.wait()
    after = run.state()
    with pytest.raises(AssertionError):
        assert_same_bits(after, saved)

    assert manager.load() == (1, {"consumed samples": 8})
    assert_same_bits(run.state(), saved)
    assert_same_bits(run.update(), logits)
    assert_same_bits(run.state(), after)

    # A fresh run, other weights and random states, no moments yet.
    fresh = make_run(wrap, rank, seed=2)
    FSDPCheckpointManager(folder, *fresh).load(1)
    assert_same_bits(fresh.state(), saved)
    assert_same_bits(fresh.update(), logits)
    assert_same_bits(fresh.state(), after)


@pytest.mark.parametrize("wrap", WRAPS)
def test_save_before_the_first_step_disturbs_nothing(wrap: str, folder: Path, rank: int) -> None:
    undisturbed = make_run(wrap, rank, seed=3)
    undisturbed.update()
    run = make_run(wrap, rank, seed=3)
    manager = FSDPCheckpointManager(folder, *run)
    manager.save(0)
    run.update()
    assert_same_bits(run.state(), undisturbed.state())
    manager.load(0)
    run.update()
    assert_same_bits(run.state(), undisturbed.state())


def test_weights_move_between_wrappers(folder: Path, rank: int) -> None:
    run = make_run("fsdp1", rank, seed=4)
    run.update()
    FSDPCheckpointManager(folder, *run).save(1)
    with FullyShardedDataParallel.summon_full_params(run.model, writeback=False):
        expected = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for name, p in run.model.named_parameters()
        }
    other = make_run("fsdp2", rank, seed=5)
    FSDPCheckpointManager(folder, *other).load()
    got = {name: p.full_tensor().detach() for name, p in other.model.named_parameters()}
    assert_same_bits(got, expected)


def test_one_changed_bit_is_noticed(folder: Path, rank: int) -> None:
    run = make_run("fsdp2", rank, seed=6)
    run.update()
    manager = FSDPCheckpointManager(folder, *run)
    manager.save(1)
    before = run.state()

    # In memory, on one rank: the comparison of the replay test must fail.
    weight = run.model.get_parameter("lm_head.weight").detach().to_local()
    weight.view(torch.int32)[0, 0] ^= 1
    with pytest.raises(AssertionError, match=r"weights.lm_head.weight: 1 bytes differ"):
        assert_same_bits(run.state(), before)
    manager.load(1)
    assert_same_bits(run.state(), before)

    # On the disk, in one rank's file: no rank may load.
    run.update()
    before = run.state()
    path = folder / "iter_0000001" / "shard_00002.safetensors"
    dist.barrier()
    if rank == 0:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    dist.barrier()
    with pytest.raises(CheckpointCorrupt, match=r"shard_00002.safetensors: SHA-256"):
        manager.load(1)
    assert_same_bits(run.state(), before)


def test_other_model_is_refused(folder: Path, rank: int) -> None:
    run = make_run("fsdp2", rank, seed=7)
    FSDPCheckpointManager(folder, *run).save(1)
    with pytest.raises(ValueError, match=r"only in the training state \['model/model.layers.1"):
        FSDPCheckpointManager(folder, qwen2(num_layers=2)).load(1)


LAYOUTS = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((4,), [Replicate()]),
]


def test_shards_load_into_any_other_layout(folder: Path) -> None:
    full = torch.randn(7, 5, generator=torch.Generator().manual_seed(8)).bfloat16()
    manager = CheckpointManager(folder)

    def laid_out(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            str(number): distribute_tensor(tensor, dist.init_device_mesh("cpu", sizes), placements)
            for number, (sizes, placements) in enumerate(LAYOUTS)
        }

    manager.save(1, laid_out(full))
    for shift in range(len(LAYOUTS)):
        loaded = laid_out(torch.zeros_like(full))
        numbers = [str((number + shift) % len(LAYOUTS)) for number in range(len(LAYOUTS))]
        manager.load(dict(zip(numbers, loaded.values(), strict=True)))
        assert_same_bits(loaded, laid_out(full))
