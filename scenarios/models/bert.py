"""BERT as Megatron-LM builds it: pre-LayerNorm, masked-LM head, sentence-order head."""

from typing import cast

import torch
from torch import Tensor, nn

from scenarios.data import Batch
from scenarios.models.bert_microbatch import BertMicrobatch
from scenarios.models.gpt import WORD_TABLE, TransformerLayer
from scenarios.parallel.layers import Layer, LayerNorm
from scenarios.parallel.losses import Loss
from scenarios.parallel.microbatch import GradientSink
from scenarios.parallel.parameters import ParameterSpec
from scenarios.parallel.replicated import ReplicatedLinear, first_rows, gelu_erf, tanh
from scenarios.parallel.vocabulary import (
    Embedding,
    OutputBias,
    WordTable,
    cross_entropy,
    tied_head_loss,
)
from scenarios.schema import ModelConfig

NUM_TOKEN_TYPES = 2


class MaskedLmHead(nn.Module):
    """Projection, GELU and LayerNorm before the word table: [T, h] -> loss of each token, [T]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        hidden, eps = config.hidden_size, config.layernorm_epsilon
        std = config.init_method_std
        self.dense = ReplicatedLinear("lm_head.dense", hidden, hidden, std, dtype)
        self.layer_norm = LayerNorm("lm_head.layer_norm", hidden, eps, dtype)
        self.output_bias = OutputBias("output_layer", config.vocab_size, dtype)

    def forward(self, x: Tensor, table: WordTable, mb: BertMicrobatch) -> Tensor:
        """[T, h] -> [T] fp32."""
        x = self.layer_norm(gelu_erf(self.dense(x, mb)), mb)
        return tied_head_loss(x, table, WORD_TABLE, mb, self.output_bias)


class SentenceOrderHead(nn.Module):
    """tanh projection of the tokens at position 0, then two classes: [T, h] -> loss, [b]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        hidden, std = config.hidden_size, config.init_method_std
        self.pooler = ReplicatedLinear("pooler.dense", hidden, hidden, std, dtype, num_blocks=1)
        self.binary_head = ReplicatedLinear("binary_head", hidden, 2, std, dtype, num_blocks=1)

    def forward(self, x: Tensor, mb: BertMicrobatch) -> Tensor:
        """[T, h] -> [b] fp32."""
        pooled = tanh(self.pooler(first_rows(x, mb.num_samples), mb))
        logits = cast(Tensor, self.binary_head(pooled, mb))
        return cross_entropy(logits[None], mb.swapped)


class Bert(nn.Module):
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
            NUM_TOKEN_TYPES,
        )
        self.layers = nn.ModuleList(
            TransformerLayer(layer, config, dtype) for layer in range(config.num_layers)
        )
        self.final_layernorm = LayerNorm(
            "decoder.final_layernorm", config.hidden_size, config.layernorm_epsilon, dtype
        )
        self.masked_lm = MaskedLmHead(config, dtype)
        self.sentence_order = SentenceOrderHead(config, dtype)

    def parameter_layers(self) -> list[Layer]:
        """The layers that own parameters, in order of use."""
        return [module for module in self.modules() if isinstance(module, Layer)]

    def specs(self) -> list[ParameterSpec]:
        """All parameters, in order of use."""
        return [spec for layer in self.parameter_layers() for spec in layer.specs]

    def microbatch(
        self, index: int, batch: Batch, seed: int, gradients: GradientSink
    ) -> BertMicrobatch:
        """A batch in the form that ``forward`` takes."""
        return BertMicrobatch.of(index, batch, seed, gradients)

    def forward(self, mb: BertMicrobatch) -> dict[str, Loss]:
        """The masked-LM loss, over the masked tokens, and the sentence-order loss, over samples."""
        token_ids = mb.token_ids()
        x = self.embedding(mb, mb.token_types)
        for layer in self.layers:
            x = layer(x, token_ids, mb)
        x = self.final_layernorm(x, mb)
        return {
            "lm loss": Loss(self.masked_lm(x, self.embedding.word_embeddings, mb), mb.loss_mask),
            "sop loss": Loss(self.sentence_order(x, mb), num_blocks=1),
        }
