"""Tiny scenarios for the tests of the builtin engine."""

from typing import Any

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
    "num_layers": 2,
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


def tiny_scenario(
    dp: int,
    *,
    family: str = "gpt",
    overlap: bool = True,
    precision: str = "fp16",
    dropout: float = 0.1,
    **training: Any,
) -> Scenario:
    """Two layers of width 64 on ``dp`` ranks; ``training`` overrides TrainingConfig fields."""
    return Scenario.build(
        family=family,
        name="tiny",
        scale="ci",
        test_type="regular",
        model=ModelConfig.build(
            **MODEL, precision=precision, hidden_dropout=dropout, attention_dropout=dropout
        ),
        training=TrainingConfig.build(**TRAINING | training),
        optimizer=OptimizerConfig.build(
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        ),
        layout=Layout.build(dp=dp),
        checkpoint=CheckpointConfig.build(),
        data=DataConfig.build(),
        metrics=metrics_of(family),
    )
