"""Experts in the builtin engine against the plain model of moe_reference.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scenarios.data import make_dataset
from scenarios.engines.builtin import Trainer
from tests import moe_reference
from tests.engine_scenarios import MOE, tiny_scenario
from tests.test_engine_reference import learning_rate, natural_parameters, slope_of_the_loss

NUM_STEPS = 20


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_engine_is_a_mixture_of_experts_with_adamw() -> None:
    scenario = tiny_scenario(
        1,
        family="moe",
        precision="fp32",
        dropout=0.0,
        train_iters=NUM_STEPS,
        lr_decay_iters=NUM_STEPS,
    )
    training, moe = scenario.training, scenario.model.moe
    assert moe is not None
    trainer = Trainer(scenario)
    parameters = natural_parameters(trainer)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    dataset = make_dataset(scenario)
    trainer.gather.start()
    losses = []
    for step in range(NUM_STEPS):
        metrics = trainer.train_step()
        reference.zero_grad()
        loss_sum = balance_sum = 0.0
        for index in range(trainer.num_microbatches):
            first = step * training.global_batch_size + index * training.micro_batch_size
            batch = dataset.batch(first, training.micro_batch_size)
            loss, balance = moe_reference.losses(
                scenario.model, parameters, batch.tokens, batch.labels
            )
            total = loss + moe.aux_loss_coeff * torch.stack(balance).sum()
            (total / trainer.num_microbatches).backward()
            loss_sum += loss.item()
            balance_sum += torch.stack(balance).mean().item()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for group in reference.param_groups:
            group["lr"] = learning_rate(scenario, step)
        reference.step()
        losses.append(loss_sum / trainer.num_microbatches)
        assert metrics["lm loss"] == pytest.approx(losses[-1], rel=1e-6)
        assert metrics["aux loss"] == pytest.approx(
            balance_sum / trainer.num_microbatches, rel=1e-5
        )
        # Differences of the parameters grow; the norm shows them before the loss does.
        assert metrics["grad-norm"] == pytest.approx(norm.item(), rel=2e-5 if step < 10 else 1e-3)
    assert losses[-1] < losses[0] - 0.2


def first_grad_norm(precision: str = "fp32", **moe: Any) -> float:
    scenario = tiny_scenario(
        1, family="moe", precision=precision, dropout=0.0, moe=moe, initial_loss_scale=2.0**8
    )
    trainer = Trainer(scenario)
    trainer.gather.start()
    norm = trainer.train_step()["grad-norm"]
    assert isinstance(norm, float)
    return norm


def test_the_norm_notices_the_aux_loss() -> None:
    """The tolerance above is tight enough to see its gradient left out, or 10 % too large."""
    right = first_grad_norm()
    assert first_grad_norm(aux_loss_coeff=0.0) != pytest.approx(right, rel=2e-5)
    assert first_grad_norm(aux_loss_coeff=1.1 * MOE["aux_loss_coeff"]) != pytest.approx(
        right, rel=2e-5
    )


def test_the_aux_loss_is_scaled_like_the_loss() -> None:
    """With fp16's loss scale; the coefficient is so large that the aux loss is the gradient."""
    right = first_grad_norm(aux_loss_coeff=100.0)
    assert right > 10 * first_grad_norm()
    assert first_grad_norm("fp16", aux_loss_coeff=100.0) == pytest.approx(right, rel=2e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_is_the_slope_of_the_loss(dropout: float) -> None:
    """With dropout, which the reference lacks; all experts are chosen, so that none changes."""
    trainer = Trainer(
        tiny_scenario(1, family="moe", precision="fp32", dropout=dropout, moe={"router_topk": 8})
    )
    assert slope_of_the_loss(trainer) == pytest.approx(1.0, rel=5e-3)
