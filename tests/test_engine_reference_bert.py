"""BERT in the builtin engine against an independent model in plain PyTorch."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scenarios.data import BertBatch, make_dataset
from scenarios.engines.builtin import Trainer
from scenarios.parallel.microbatch import Microbatch
from scenarios.scenario import Scenario
from tests.engine_scenarios import tiny_scenario
from tests.test_engine_reference import natural_parameters

NUM_STEPS = 20
SCHEDULE = {"train_iters": NUM_STEPS, "lr": 2e-3, "min_lr": 1e-4, "lr_decay_style": "linear"}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scenario_of(dropout: float = 0.0) -> Scenario:
    schedule = {**SCHEDULE, "lr_decay_iters": NUM_STEPS}
    return tiny_scenario(1, family="bert", precision="fp32", dropout=dropout, **schedule)


class Reference:
    """The model as functions of its parameters, in the usual shapes."""

    def __init__(self, scenario: Scenario, parameters: dict[str, torch.nn.Parameter]):
        self.config = scenario.model
        self.parameters = parameters

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return F.linear(x, weight, bias[: len(weight)])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.layernorm_epsilon)

    def attention(self, x: Tensor, seen: Tensor, name: str) -> Tensor:
        samples, length, hidden = x.shape
        heads = self.config.num_attention_heads
        qkv = self.linear(x, f"{name}.linear_qkv").view(samples, length, heads, 3, hidden // heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        mask = seen[:, None, None, :].expand(samples, 1, length, length)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.linear(context.transpose(1, 2).flatten(2), f"{name}.linear_proj")

    def losses(self, batch: BertBatch) -> tuple[Tensor, Tensor]:
        """Masked-LM and sentence-order loss of one microbatch."""
        words = self.parameters["embedding.word_embeddings.weight"]
        length = batch.tokens.shape[1]
        x = words[batch.tokens]
        x = x + self.parameters["embedding.position_embeddings.weight"][:length]
        x = x + self.parameters["embedding.tokentype_embeddings.weight"][batch.token_types]
        seen = torch.arange(length) < batch.lengths[:, None]
        for layer in range(self.config.num_layers):
            name = f"decoder.layers.{layer}"
            y = self.norm(x, f"{name}.input_layernorm")
            x = x + self.attention(y, seen, f"{name}.self_attention")
            y = self.linear(self.norm(x, f"{name}.pre_mlp_layernorm"), f"{name}.mlp.linear_fc1")
            x = x + self.linear(F.gelu(y, approximate="tanh"), f"{name}.mlp.linear_fc2")
        x = self.norm(x, "decoder.final_layernorm")
        y = self.norm(F.gelu(self.linear(x, "lm_head.dense")), "lm_head.layer_norm")
        logits = y @ words.t() + self.parameters["output_layer.bias"]
        lm = F.cross_entropy(logits[batch.loss_mask], batch.labels[batch.loss_mask])
        pooled = torch.tanh(self.linear(x[:, 0], "pooler.dense"))
        return lm, F.cross_entropy(self.linear(pooled, "binary_head"), batch.swapped)


def microbatches(scenario: Scenario, step: int) -> list[BertBatch]:
    training, dataset = scenario.training, make_dataset(scenario)
    batches = []
    for first in range(0, training.global_batch_size, training.micro_batch_size):
        start = step * training.global_batch_size + first
        batch = dataset.batch(start, training.micro_batch_size)
        assert isinstance(batch, BertBatch)
        batches.append(batch)
    return batches


def learning_rate(scenario: Scenario, step: int) -> float:
    """Of the update of ``step``, counted from 0: one step of warmup, then linear."""
    training = scenario.training
    if step <= 1:
        return training.lr * step
    ratio = (step - 1) / (training.lr_decay_iters - 1)
    return training.min_lr + (training.lr - training.min_lr) * (1 - ratio)


def test_engine_is_bert_with_adamw() -> None:
    scenario = scenario_of()
    trainer = Trainer(scenario)
    parameters = natural_parameters(trainer)
    reference = Reference(scenario, parameters)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    trainer.gather.start()
    lm_losses, num_masked = [], set()
    for step in range(NUM_STEPS):
        metrics = trainer.train_step()
        optimizer.zero_grad()
        batches = microbatches(scenario, step)
        losses = torch.stack([torch.stack(reference.losses(batch)) for batch in batches])
        lm, sop = losses.mean(dim=0)
        (lm + sop).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(scenario, step)
        optimizer.step()
        params_norm = math.sqrt(
            sum(float(p.detach().double().square().sum()) for p in parameters.values())
        )
        assert metrics["lm loss"] == pytest.approx(lm.item(), rel=1e-6)
        assert metrics["sop loss"] == pytest.approx(sop.item(), rel=1e-6)
        assert metrics["grad-norm"] == pytest.approx(norm.item(), rel=2e-5)
        assert metrics["params-norm"] == pytest.approx(params_norm, rel=1e-4)
        rate = learning_rate(scenario, step + 1)
        assert metrics["learning-rate"] == pytest.approx(rate, rel=1e-12)
        num_masked |= {int(batch.loss_mask.sum()) for batch in batches}
        lm_losses.append(lm.item())
    assert len(num_masked) > 1, "microbatches with different numbers of masked tokens"
    assert lm_losses[-1] < lm_losses[0] - 0.2


MUTATIONS = [
    "embedding.tokentype_embeddings.weight",
    "lm_head.layer_norm.bias",
    "pooler.dense.bias",
]


@pytest.mark.parametrize("name", [*MUTATIONS, "output_layer.bias", "binary_head.bias"])
def test_reference_notices_a_small_change(name: str) -> None:
    """The tolerances above are tight enough to see one small term changed."""
    scenario = scenario_of()
    parameters = natural_parameters(Trainer(scenario))
    reference = Reference(scenario, parameters)
    (batch, *_) = microbatches(scenario, 0)
    right = torch.stack(reference.losses(batch))
    with torch.no_grad():
        parameters[name].view(-1)[::3].add_(2e-2)
    wrong = torch.stack(reference.losses(batch))
    assert (abs(wrong / right - 1) > 1e-6).any()


def test_padding_changes_no_loss() -> None:
    """What stands in the padding is seen by no token that counts."""
    scenario = scenario_of()
    trainer = Trainer(scenario)
    dataset = make_dataset(scenario)
    batch = dataset.batch(0, 8)
    assert isinstance(batch, BertBatch)
    assert int(batch.lengths.min()) < batch.tokens.shape[1]
    trainer.gather.start()
    trainer.gather.finish()

    def losses(tokens: Tensor) -> list[Tensor]:
        other = BertBatch(**{**vars(batch), "tokens": tokens})
        mb = Microbatch.create(
            0, tokens, batch.labels, batch.sample_index, 1, trainer.reducer, trainer.mesh
        )
        mb = trainer.model.with_inputs(mb, other)
        return [loss.mean() for loss in trainer.model.losses(trainer.model(None, mb), mb).values()]

    padding = torch.arange(batch.tokens.shape[1]) >= batch.lengths[:, None]
    assert losses(batch.tokens.masked_fill(padding, 3)) == losses(batch.tokens)
    inside = batch.tokens.clone()
    inside[:, 1] = 3
    assert losses(inside) != losses(batch.tokens)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_is_the_slope_of_the_loss(dropout: float) -> None:
    """With dropout, which the reference does not have: same masks forward, again and backward."""
    trainer = Trainer(scenario_of(dropout))
    shards = trainer.optimizer.shards
    generator = torch.Generator().manual_seed(0)
    for shard in shards:  # away from the start, where most gradients are tiny
        shard.main.add_(torch.randn(shard.main.shape, generator=generator), alpha=0.1)

    def loss() -> float:
        trainer.gather.start()
        losses, _ = trainer.forward_backward()
        trainer.reducer.finish()
        return float(losses.double().view(-1, 2).mean(dim=0).sum())

    loss()
    start = [shard.main.clone() for shard in shards]
    direction = [shard.grad.clone() for shard in shards]
    square = sum(float(gradient.double().square().sum()) for gradient in direction)
    values = []
    for sign in (1, -1):
        for shard, main, gradient in zip(shards, start, direction, strict=True):
            shard.main.copy_(main + sign * 2e-3 / math.sqrt(square) * gradient)
        values.append(loss())
    slope = (values[0] - values[1]) / (2 * 2e-3)
    assert slope == pytest.approx(math.sqrt(square), rel=5e-3)
