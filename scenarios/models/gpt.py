"""GPT: learned positions, pre-LayerNorm, tied embedding, as Megatron-LM builds it."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from scenarios.models.mlp import Mlp
from scenarios.models.model import Model
from scenarios.models.moe import MoeMlp
from scenarios.parallel.attention import SelfAttention
from scenarios.parallel.layers import LayerNorm, dropout_add
from scenarios.parallel.mesh import Stage
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.vocabulary import Embedding, WordTable, tied_head_loss
from scenarios.schema import ModelConfig

WORD_TABLE = "embedding.word_embeddings"


class TransformerLayer(nn.Module):
    """x + dropout(attention(norm(x))), then the same with the MLP or the experts."""

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
            bias=not config.disable_bias_linear,
        )
        self.pre_mlp_layernorm = LayerNorm(f"{name}.pre_mlp_layernorm", hidden, eps, dtype)
        self.mlp = _mlp(f"{name}.mlp", layer, config, output_std, dtype)

    def forward(self, x: Tensor, token_ids: Tensor, mb: Microbatch) -> Tensor:
        """[local tokens, h] -> the same."""
        y = self.self_attention(self.input_layernorm(x, mb), mb)
        key = mb.dropout_key(self.layer, "attention output")
        x = dropout_add(y, x, self.hidden_dropout, key, token_ids)
        y = self.mlp(self.pre_mlp_layernorm(x, mb), mb)
        key = mb.dropout_key(self.layer, "mlp output")
        return dropout_add(y, x, self.hidden_dropout, key, token_ids)


def _mlp(
    name: str, layer: int, config: ModelConfig, output_std: float, dtype: torch.dtype
) -> Mlp | MoeMlp:
    hidden, std = config.hidden_size, config.init_method_std
    if config.moe is not None:
        return MoeMlp(name, layer, hidden, config.moe, std, output_std, dtype)
    bias = not config.disable_bias_linear
    exact_gelu = config.exact_gelu or not bias
    return Mlp(name, hidden, config.ffn_hidden_size, bias, exact_gelu, std, output_std, dtype)


class Gpt(Model):
    """One pipeline stage of a GPT; with one stage, the whole model.

    Args:
        config: sizes and dropout.
        dtype: the compute dtype of weights and activations.
        stage: which layers, and whether embedding and head.

    Raises:
        ValueError: sizes that do not divide into canonical parts.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, stage: Stage):
        super().__init__()
        self.stage = stage
        vocab_size, hidden, std = config.vocab_size, config.hidden_size, config.init_method_std
        if stage.is_first:
            self.embedding = Embedding(
                "embedding",
                vocab_size,
                config.max_position_embeddings,
                hidden,
                std,
                config.hidden_dropout,
                dtype,
                stage,
            )
        self.layers = nn.ModuleList(
            TransformerLayer(layer, config, dtype) for layer in stage.layers(config.num_layers)
        )
        if stage.is_last:
            self.final_layernorm = LayerNorm(
                "decoder.final_layernorm", hidden, config.layernorm_epsilon, dtype
            )
            self.head = (
                self.embedding.word_embeddings
                if stage.is_first
                else WordTable(WORD_TABLE, vocab_size, hidden, std, dtype, stage)
            )

    def forward(self, x: Tensor | None, mb: Microbatch) -> Tensor:
        """The loss of every token on the last stage, activations on the others; see ``Model``."""
        token_ids = mb.token_ids()
        if x is None:
            x = self.embedding(mb)
        for layer in self.layers:
            x = layer(x, token_ids, mb)
        if not self.stage.is_last:
            return cast(Tensor, x)
        return tied_head_loss(self.final_layernorm(x, mb), self.head, WORD_TABLE, mb)
