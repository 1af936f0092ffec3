"""BERT's two modules that megatron-core 0.16.1 lacks: its layers norm before attention and MLP.

The source norms after: the embeddings, and each sum of a residual. ``bert_build`` puts these
modules into the real BertModel.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class SumThenNorm(nn.Module):
    """In place of bias-dropout-add in a layer specification: the sum with a residual is normed."""

    def __init__(self, config: Any, norm: Any) -> None:
        """Args: config: the TransformerConfig. norm: class of the norm, built as a layer's own."""
        super().__init__()
        self.norm = build_norm(config, norm)

    def forward(self, training: bool, fused: bool) -> Add:
        """The function that adds and norms; arguments as of get_bias_dropout_add."""
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

        add = get_bias_dropout_add(training, fused)
        return lambda with_bias, residual, dropout: self.norm(add(with_bias, residual, dropout))


class NormThenDropout(nn.Module):
    """In place of ``embedding.embedding_dropout``: the summed embeddings are normed first."""

    def __init__(self, config: Any, norm: Any) -> None:
        """Args: as of ``SumThenNorm``."""
        super().__init__()
        self.norm = build_norm(config, norm)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, embeddings: Tensor) -> Tensor:
        """[tokens, sequences, hidden], as they go in."""
        dropped: Tensor = self.dropout(self.norm(embeddings))
        return dropped


def build_norm(config: Any, norm: Any) -> nn.Module:
    """A norm over the hidden size, as megatron-core builds its own."""
    built: nn.Module = norm(
        config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
    )
    return built
