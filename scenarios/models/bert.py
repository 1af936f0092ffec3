"""BERT as Megatron-LM builds it: pre-LayerNorm, masked-LM head, sentence-order head."""

from typing import cast

import torch
from torch import Tensor, nn

from scenarios.data import Batch
from scenarios.models.bert_microbatch import BertMicrobatch
from scenarios.models.gpt import WORD_TABLE, TransformerLayer
from scenarios.models.model import Model
from scenarios.parallel.layers import LayerNorm, gelu_erf
from scenarios.parallel.losses import Loss
from scenarios.parallel.mesh import Stage
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.replicated import (
    ReplicatedLinear,
    class_entropy,
    first_tokens,
    tanh,
)
from scenarios.parallel.vocabulary import Embedding, OutputBias, WordTable, biased_head_loss
from scenarios.schema import ModelConfig

NUM_TOKEN_TYPES = 2
OUTPUT = "output_layer"


class MaskedLmHead(nn.Module):
    """Projection, GELU and LayerNorm before the word table: [L, h] -> loss of each token, [T]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        hidden, eps = config.hidden_size, config.layernorm_epsilon
        std = config.init_method_std
        self.dense = ReplicatedLinear("lm_head.dense", hidden, hidden, std, dtype)
        self.layer_norm = LayerNorm("lm_head.layer_norm", hidden, eps, dtype)
        self.output_bias = OutputBias(OUTPUT, config.vocab_size, dtype)

    def forward(self, x: Tensor, table: WordTable, mb: BertMicrobatch) -> Tensor:
        """[L, h] -> [T] fp32, on all tp ranks."""
        x = self.layer_norm(gelu_erf(self.dense(x, mb)), mb)
        return biased_head_loss(x, table, self.output_bias, mb)


class SentenceOrderHead(nn.Module):
    """tanh projection of the tokens at position 0, then two classes: [L, h] -> loss, [samples]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        hidden, std = config.hidden_size, config.init_method_std
        self.pooler = ReplicatedLinear("pooler.dense", hidden, hidden, std, dtype, per_token=False)
        self.binary_head = ReplicatedLinear("binary_head", hidden, 2, std, dtype, per_token=False)

    def forward(self, x: Tensor, mb: BertMicrobatch) -> Tensor:
        """[L, h] -> [samples] fp32, on all tp ranks."""
        pooled = tanh(self.pooler(first_tokens(x, mb), mb))
        return class_entropy(self.binary_head(pooled, mb), mb.swapped)


class Bert(Model):
    """One pipeline stage of a BERT; with one stage, the whole model.

    Args:
        config: sizes and dropout.
        dtype: the compute dtype of weights and activations.
        stage: which layers, and whether embedding and heads.

    Raises:
        ValueError: sizes that do not divide into canonical parts.
    """

    loss_names = ("lm loss", "sop loss")

    def __init__(self, config: ModelConfig, dtype: torch.dtype, stage: Stage):
        super().__init__()
        self.stage = stage
        vocab_size, hidden, std = config.vocab_size, config.hidden_size, config.init_method_std
        head = f"{OUTPUT}.weight"
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
                NUM_TOKEN_TYPES,
                head,
            )
        self.layers = nn.ModuleList(
            TransformerLayer(layer, config, dtype) for layer in stage.layers(config.num_layers)
        )
        if stage.is_last:
            self.final_layernorm = LayerNorm(
                "decoder.final_layernorm", hidden, config.layernorm_epsilon, dtype
            )
            self.masked_lm = MaskedLmHead(config, dtype)
            self.word_table = (
                self.embedding.word_embeddings
                if stage.is_first
                else WordTable(WORD_TABLE, vocab_size, hidden, std, dtype, stage, head)
            )
            self.sentence_order = SentenceOrderHead(config, dtype)

    def with_inputs(self, mb: Microbatch, batch: Batch) -> Microbatch:
        """The microbatch with token types, lengths and what is to be predicted."""
        return BertMicrobatch.extend(mb, batch)

    def losses(self, values: Tensor, mb: Microbatch) -> dict[str, Loss]:
        """The masked-LM loss, over the masked tokens, and the sentence-order loss, over samples."""
        assert isinstance(mb, BertMicrobatch)
        num_tokens = mb.tokens.numel()
        return {
            "lm loss": Loss(values[:num_tokens], mb.loss_mask),
            "sop loss": Loss(values[num_tokens:], num_blocks=1),
        }

    def forward(self, x: Tensor | None, mb: Microbatch) -> Tensor:
        """On the last stage the masked-LM loss of every token, then the sentence-order loss of
        every sample, [tokens + samples]; activations on the others; see ``Model``."""
        assert isinstance(mb, BertMicrobatch)
        token_ids = mb.token_ids()
        if x is None:
            x = self.embedding(mb, mb.token_types)
        for layer in self.layers:
            x = layer(x, token_ids, mb)
        if not self.stage.is_last:
            return cast(Tensor, x)
        x = self.final_layernorm(x, mb)
        of_tokens = self.masked_lm(x, self.word_table, mb)
        return torch.cat((of_tokens, self.sentence_order(x, mb)))
