"""GPT: learned positions, pre-LayerNorm, biases, tied embedding, as Megatron-LM builds it."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from scenarios.data import Batch
from scenarios.parallel.attention import SelfAttention
from scenarios.parallel.layers import (
    ColumnLinear,
    Layer,
    LayerNorm,
    RowLinear,
    dropout_add,
    gelu,
)
from scenarios.parallel.losses import Loss
from scenarios.parallel.microbatch import GradientSink, Microbatch
from scenarios.parallel.parameters import ParameterSpec
from scenarios.parallel.vocabulary import Embedding, tied_head_loss
from scenarios.schema import ModelConfig

WORD_TABLE = "embedding.word_embeddings"


class Mlp(nn.Module):
    """Two projections around a GELU: [T, h] -> [T, h]."""

    def __init__(self, name: str, config: ModelConfig, output_std: float, dtype: torch.dtype):
        super().__init__()
        hidden, ffn, std = config.hidden_size, config.ffn_hidden_size, config.init_method_std
        self.linear_fc1 = ColumnLinear(f"{name}.linear_fc1", hidden, ffn, std, dtype)
        self.linear_fc2 = RowLinear(f"{name}.linear_fc2", ffn, hidden, output_std, dtype)

    def forward(self, x: Tensor, mb: Microbatch) -> Tensor:
        """[T, h] -> [T, h]."""
        return cast(Tensor, self.linear_fc2(gelu(self.linear_fc1(x, mb)), mb))


class TransformerLayer(nn.Module):
    """x + dropout(attention(norm(x))), then the same with the MLP."""

    def __init__(self, layer: int, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        name = f"decoder.layers.{layer}"
        hidden, eps = config.hidden_size, config.layernorm_epsilon
        output_std = config.init_method_std / math.sqrt(2.0 * config.num_layers)
        self.layer = layer
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = LayerNorm(f"{name}.input_layernorm", hidden, eps, dtype)
        self.self_attention = SelfAttention(
            f"{name}.self_attention",
            layer,
            hidden,
            config.num_attention_heads,
            config.attention_dropout,
            config.apply_query_key_layer_scaling,
            config.init_method_std,
            output_std,
            dtype,
        )
        self.pre_mlp_layernorm = LayerNorm(f"{name}.pre_mlp_layernorm", hidden, eps, dtype)
        self.mlp = Mlp(f"{name}.mlp", config, output_std, dtype)

    def forward(self, x: Tensor, token_ids: Tensor, mb: Microbatch) -> Tensor:
        """[T, h] -> [T, h]."""
        y = self.self_attention(self.input_layernorm(x, mb), mb)
        key = mb.dropout_key(self.layer, "attention output")
        x = dropout_add(y, x, self.hidden_dropout, key, token_ids)
        y = self.mlp(self.pre_mlp_layernorm(x, mb), mb)
        key = mb.dropout_key(self.layer, "mlp output")
        return dropout_add(y, x, self.hidden_dropout, key, token_ids)


class Gpt(nn.Module):
    """The whole model; parameters are empty until the optimizer fills them.

    Args:
        config: sizes and dropout.
        dtype: the compute dtype of weights and activations.

    Raises:
        ValueError: sizes that do not divide into canonical parts.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.embedding = Embedding(
            "embedding",
            config.vocab_size,
            config.max_position_embeddings,
            config.hidden_size,
            config.init_method_std,
            config.hidden_dropout,
            dtype,
        )
        self.layers = nn.ModuleList(
            TransformerLayer(layer, config, dtype) for layer in range(config.num_layers)
        )
        self.final_layernorm = LayerNorm(
            "decoder.final_layernorm", config.hidden_size, config.layernorm_epsilon, dtype
        )

    def parameter_layers(self) -> list[Layer]:
        """The layers that own parameters, in order of use."""
        return [module for module in self.modules() if isinstance(module, Layer)]

    def specs(self) -> list[ParameterSpec]:
        """All parameters, in order of use."""
        return [spec for layer in self.parameter_layers() for spec in layer.specs]

    def microbatch(
        self, index: int, batch: Batch, seed: int, gradients: GradientSink
    ) -> Microbatch:
        """A batch in the form that ``forward`` takes."""
        return Microbatch.of(index, batch, seed, gradients)

    def forward(self, mb: Microbatch) -> dict[str, Loss]:
        """The losses by name; here one, over all tokens."""
        token_ids = mb.token_ids()
        x = self.embedding(mb)
        for layer in self.layers:
            x = layer(x, token_ids, mb)
        x = self.final_layernorm(x, mb)
        loss = tied_head_loss(x, self.embedding.word_embeddings, WORD_TABLE, mb)
        return {"lm loss": Loss(loss)}
