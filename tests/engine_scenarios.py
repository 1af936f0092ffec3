"""Tiny scenarios for the tests of the builtin engine."""

from typing import Any

from scenarios.moe_config import MoeConfig
from scenarios.scenario import (
    CheckpointConfig,
    DataConfig,
    Layout,
    ModelConfig,
    OptimizerConfig,
    Scenario,
    TrainingConfig,
    metrics_of,
)

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 8,
    "seq_length": 16,
    "max_position_embeddings": 24,
    "vocab_size": 64,
    "apply_query_key_layer_scaling": True,
}
TRAINING: dict[str, Any] = {
    "micro_batch_size": 2,
    "global_batch_size": 16,
    "train_iters": 6,
    "lr": 0.01,
    "min_lr": 0.001,
    "lr_decay_style": "cosine",
    "lr_decay_iters": 6,
    "lr_warmup_iters": 1,
    "initial_loss_scale": 2.0**22,
    "loss_scale_window": 2,
}

MOE: dict[str, Any] = {
    "num_experts": 8,
    "ffn_hidden_size": 64,
    "shared_expert_intermediate_size": 64,
    "aux_loss_coeff": 0.01,
}


def tiny_scenario(
    layout: int | str,
    *,
    family: str = "gpt",
    overlap: bool = True,
    precision: str = "fp16",
    dropout: float = 0.1,
    moe: dict[str, Any] | None = None,
    **training: Any,
) -> Scenario:
    """Four layers of width 64; ``training`` overrides TrainingConfig fields.

    ``layout``: as text, or the degree of a data-parallel one.
    ``moe``: overrides MoeConfig fields in family moe.
    """
    cut = Layout.build(dp=layout) if isinstance(layout, int) else Layout.parse(layout)
    zero1 = cut.zero1 is not False
    experts = MoeConfig.build(**MOE | (moe or {})) if family == "moe" else None
    return Scenario.build(
        family=family,
        name="tiny",
        scale="ci",
        test_type="regular",
        model=ModelConfig.build(
            **MODEL,
            precision=precision,
            hidden_dropout=dropout,
            attention_dropout=dropout,
            disable_bias_linear=experts is not None,
            moe=experts,
        ),
        training=TrainingConfig.build(**TRAINING | training),
        optimizer=OptimizerConfig.build(
            use_distributed_optimizer=zero1,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and zero1,
        ),
        layout=cut,
        checkpoint=CheckpointConfig.build(),
        data=DataConfig.build(),
        metrics=metrics_of(family, experts is not None),
    )
