"""What resuming refuses: state that is not what was saved, another scenario, no checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from primitives.checkpoint import CheckpointManager
from primitives.errors import CheckpointCorrupt
from scenarios.engines.builtin import Trainer, train
from scenarios.run_context import RunContext
from tests.engine_scenarios import tiny_scenario


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def saved(tmp_path: Path) -> CheckpointManager:
    """A checkpoint after one real update."""
    trainer = Trainer(tiny_scenario(1, initial_loss_scale=1024.0, lr_warmup_iters=0))
    trainer.gather.start()
    assert trainer.train_step()["grad-norm"] is not None
    manager = CheckpointManager(tmp_path)
    trainer.state.save(manager, asynchronous=False)
    return manager


def resumer() -> Trainer:
    return Trainer(tiny_scenario(1, initial_loss_scale=1024.0, lr_warmup_iters=0))


def after_load(manager: CheckpointManager, change: Callable[[dict[str, Any]], None]) -> None:
    """Makes the manager's loads deliver something else than they read."""
    load = manager.load

    def wrong(state: dict[str, Any], step: int | None = None) -> int:
        loaded = load(state, step)
        change(state)
        return loaded

    manager.load = wrong  # type: ignore[method-assign]


def test_all_state_comes_back(saved: CheckpointManager) -> None:
    trainer = resumer()
    trainer.state.load(saved)
    assert trainer.state.progress() == {
        "step": 1,
        "consumed_samples": 16,
        "num_updates": 1,
        "schedule_samples": 16,
        "loss_scaler": {"scale": 1024.0, "num_good_steps": 1, "hysteresis_left": 2},
        "rng": {"seed": 1234, "next_sample": 16},
    }
    assert all(bool(shard.exp_avg_sq.any()) for shard in trainer.optimizer.shards)


@pytest.mark.parametrize("kind", ["main", "exp_avg", "exp_avg_sq"])
def test_one_flipped_bit_is_named(saved: CheckpointManager, kind: str) -> None:
    entry = "decoder.layers.1.mlp.linear_fc1.weight.block3.slice5"

    def flip(state: dict[str, Any]) -> None:
        if kind in state:
            state[kind][entry].view(torch.int32)[7] ^= 1

    after_load(saved, flip)
    with pytest.raises(CheckpointCorrupt, match=f"{kind} of {entry} differs"):
        resumer().state.load(saved)


def test_wrong_progress_is_noticed(saved: CheckpointManager) -> None:
    def earlier(state: dict[str, Any]) -> None:
        if "progress" in state:
            state["progress"] = state["progress"].replace('"step": 1', '"step": 0')

    after_load(saved, earlier)
    with pytest.raises(CheckpointCorrupt, match="step differs"):
        resumer().state.load(saved)


def test_another_scenario_is_refused(saved: CheckpointManager) -> None:
    other = Trainer(tiny_scenario(1, initial_loss_scale=1024.0, lr_warmup_iters=0, lr=0.02))
    with pytest.raises(ValueError, match=r"training\.lr was 0\.01, is 0\.02"):
        other.state.load(saved)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        resumer().state.load(CheckpointManager(tmp_path))


def test_train_logs_every_step_and_resumes(tmp_path: Path) -> None:
    logs: list[dict[int, dict[str, Any]]] = []
    for resume in (False, True):
        log: dict[int, dict[str, Any]] = {}
        scenario = tiny_scenario(1, train_iters=3)
        checkpoint = scenario.checkpoint.model_copy(update={"save_interval": 2})
        scenario = scenario.model_copy(update={"checkpoint": checkpoint})

        def record(step: int, metrics: Mapping[str, Any], log: Any = log) -> None:
            log[step] = dict(metrics)

        train(scenario, RunContext(tmp_path, tmp_path, resume, record))
        logs.append(log)
    first, second = logs
    assert (list(first), list(second)) == ([1, 2, 3], [3])
    assert first[3].pop("iteration-time") > 0
    assert second[3].pop("iteration-time") > 0
    assert second[3] == first[3]


def test_other_ranks_and_families_are_refused() -> None:
    with pytest.raises(ValueError, match="tp2,pp1,dp1 needs 2 ranks; the process group has 1"):
        Trainer(tiny_scenario("tp2"))
    with pytest.raises(ValueError, match="family: got mamba, expected one of gpt"):
        Trainer(tiny_scenario(1).model_copy(update={"family": "mamba"}))
