"""The innermost step of latent attention on a CPU, where megatron-core 0.16.1 has none.

Its MLASelfAttention gives its core attention the sizes of keys and values, which differ; only
Transformer Engine's takes them. Everything around this step is megatron-core's own.
"""

from typing import Any

import torch
from torch import Tensor, nn


class LatentCoreAttention(nn.Module):
    """Causal softmax attention, written out."""

    def __init__(self, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attention of every position to itself and those before it.

        Args:
            query: [tokens, sequences, heads, size of a key].
            key: as ``query``.
            value: [tokens, sequences, heads, size of a value].
        Returns:
            [tokens, sequences, heads * size of a value].
        """
        scores = torch.einsum("ibhd,jbhd->bhij", query, key) * self.softmax_scale
        tokens = query.shape[0]
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        return torch.einsum("bhij,jbhd->ibhd", weights, value).flatten(2)


NOTE = (
    "core attention is written out here: megatron-core's own needs Transformer Engine for latent "
    "attention"
)
