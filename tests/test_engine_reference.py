"""The builtin engine against an independent model in plain PyTorch: it computes the right thing.

The reference knows nothing of canonical parts, microbatch trees, buckets or slices.
"""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from primitives.layout import NUM_PARTS
from scenarios.data import make_dataset
from scenarios.engines.builtin import Trainer
from scenarios.scenario import Scenario
from tests.engine_scenarios import tiny_scenario

NUM_STEPS = 6


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def natural_parameters(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    """The trainer's initial values in the usual shapes."""
    parameters = {}
    for shard in trainer.optimizer.shards:
        spec = shard.spec
        value = shard.main.reshape(spec.shape).clone()
        if ".linear_proj.weight" in spec.name or ".linear_fc2.weight" in spec.name:
            value = value.transpose(0, 1).reshape(spec.shape[1], -1)
        elif spec.num_blocks == NUM_PARTS:
            value = value.reshape(-1, *spec.shape[2:])
        parameters[spec.name] = torch.nn.Parameter(value)
    return parameters


def reference_loss(
    scenario: Scenario, parameters: dict[str, torch.nn.Parameter], tokens: Tensor, labels: Tensor
) -> Tensor:
    config = scenario.model
    heads, hidden = config.num_attention_heads, config.hidden_size
    samples, length = tokens.shape
    words = parameters["embedding.word_embeddings.weight"]
    x = words[tokens] + parameters["embedding.position_embeddings.weight"][:length]
    for layer in range(config.num_layers):
        prefix = f"decoder.layers.{layer}."

        def linear(y: Tensor, name: str, prefix: str = prefix) -> Tensor:
            return F.linear(
                y, parameters[f"{prefix}{name}.weight"], parameters[f"{prefix}{name}.bias"]
            )

        def norm(y: Tensor, name: str, prefix: str = prefix) -> Tensor:
            weight, bias = parameters[f"{prefix}{name}.weight"], parameters[f"{prefix}{name}.bias"]
            return F.layer_norm(y, (hidden,), weight, bias, config.layernorm_epsilon)

        qkv = linear(norm(x, "input_layernorm"), "self_attention.linear_qkv")
        q, k, v = qkv.view(samples, length, heads, 3, hidden // heads).permute(3, 0, 2, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        context = context.transpose(1, 2).reshape(samples, length, hidden)
        x = x + linear(context, "self_attention.linear_proj")
        y = F.gelu(linear(norm(x, "pre_mlp_layernorm"), "mlp.linear_fc1"), approximate="tanh")
        x = x + linear(y, "mlp.linear_fc2")
    final = "decoder.final_layernorm"
    weight, bias = parameters[f"{final}.weight"], parameters[f"{final}.bias"]
    x = F.layer_norm(x, (hidden,), weight, bias, config.layernorm_epsilon)
    return F.cross_entropy((x @ words.t()).flatten(0, 1), labels.flatten())


def learning_rate(scenario: Scenario, step: int) -> float:
    """Of the update of ``step``, counted from 0."""
    training = scenario.training
    if step <= 1:
        return training.lr * step
    ratio = (step - 1) / (training.lr_decay_iters - 1)
    return training.min_lr + (training.lr - training.min_lr) * (1 + math.cos(math.pi * ratio)) / 2


def test_engine_is_gpt_with_adamw() -> None:
    scenario = tiny_scenario(1, precision="fp32", dropout=0.0)
    trainer = Trainer(scenario)
    parameters = natural_parameters(trainer)
    decaying = [p for name, p in parameters.items() if p.ndim > 1]
    flat = [p for name, p in parameters.items() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": 0.01}, {"params": flat, "weight_decay": 0.0}],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    dataset = make_dataset(scenario)
    batch_size = scenario.training.global_batch_size
    trainer.gather.start()
    losses = []
    for step in range(NUM_STEPS):
        metrics = trainer.train_step()
        reference.zero_grad()
        batch = dataset.batch(step * batch_size, batch_size)
        loss = reference_loss(scenario, parameters, batch.tokens, batch.labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        zeros = sum(int((p.grad == 0).sum()) for p in parameters.values() if p.grad is not None)
        for group in reference.param_groups:
            group["lr"] = learning_rate(scenario, step)
        reference.step()
        params_norm = math.sqrt(
            sum(float(p.detach().double().square().sum()) for p in parameters.values())
        )
        assert metrics["lm loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert metrics["grad-norm"] == pytest.approx(norm.item(), rel=2e-5)
        # Positions that no sample reaches, and key biases: their gradient is zero but for rounding,
        # so AdamW moves them by noise, which changes no loss.
        num_zeros = metrics["num-zeros"]
        assert isinstance(num_zeros, int)
        assert 8 * 64 <= zeros <= 8 * 64 + 2 * 64
        assert 8 * 64 <= num_zeros <= 8 * 64 + 2 * 64
        assert metrics["params-norm"] == pytest.approx(params_norm, rel=1e-4)
        next_rate = learning_rate(scenario, step + 1)
        assert metrics["learning-rate"] == pytest.approx(next_rate, rel=1e-12)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_reference_notices_a_missing_layer_norm_bias() -> None:
    """The tolerances above are tight enough to see one small term left out."""
    scenario = tiny_scenario(1, precision="fp32", dropout=0.0)
    parameters = natural_parameters(Trainer(scenario))
    batch = make_dataset(scenario).batch(0, 16)
    right = reference_loss(scenario, parameters, batch.tokens, batch.labels)
    with torch.no_grad():
        parameters["decoder.layers.1.mlp.linear_fc1.bias"].add_(1e-3)
    wrong = reference_loss(scenario, parameters, batch.tokens, batch.labels)
    assert wrong.item() != pytest.approx(right.item(), rel=1e-6)


def slope_of_the_loss(trainer: Trainer) -> float:
    """Measured slope of the loss along the gradient, relative to the gradient's norm."""
    shards = trainer.optimizer.shards
    generator = torch.Generator().manual_seed(0)
    for shard in shards:  # away from the start, where most gradients are tiny
        noise = torch.randn(shard.main.shape, generator=generator)
        shard.main.add_(noise, alpha=0.1)

    def loss() -> float:
        trainer.gather.start()
        losses, _ = trainer.forward_backward()
        trainer.reducer.finish()
        return float(losses.double().mean())

    loss()
    start = [shard.main.clone() for shard in shards]
    direction = [shard.grad.clone() for shard in shards]
    square = sum(float(gradient.double().square().sum()) for gradient in direction)
    values = []
    for sign in (1, -1):
        for shard, main, gradient in zip(shards, start, direction, strict=True):
            shard.main.copy_(main + sign * 2e-3 / math.sqrt(square) * gradient)
        values.append(loss())
    return (values[0] - values[1]) / (2 * 2e-3) / math.sqrt(square)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_is_the_slope_of_the_loss(dropout: float) -> None:
    """With dropout, which the reference does not have: same masks forward, again and backward."""
    trainer = Trainer(tiny_scenario(1, precision="fp32", dropout=dropout))
    assert slope_of_the_loss(trainer) == pytest.approx(1.0, rel=5e-3)
