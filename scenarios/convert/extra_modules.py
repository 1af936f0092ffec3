"""Modules that stand in a GPTModel where megatron-core 0.16.1 has none: embedding, norms, logits.

They take megatron-core's arguments, so a layer specification may name them; ``extra.py`` does.
"""

import functools
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class ScaledEmbedding(LanguageModelEmbedding):  # type: ignore[misc]
    """Embeddings times a factor, which is rounded to the dtype of the table first (Gemma)."""

    embedding_scale: float

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The scaled embeddings, [tokens, sequences, hidden]."""
        scale = torch.tensor(self.embedding_scale, dtype=torch.float32)
        states: Tensor = super().forward(*args, **kwargs)
        return states * scale.to(self.word_embeddings.weight.dtype)


class SoftCappedOutputLayer(ColumnParallelLinear):  # type: ignore[misc]
    """Logits between -logit_softcap and logit_softcap, each from itself alone (Gemma 2)."""

    logit_softcap: float

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The capped logits, [tokens, sequences, vocab / tp], and no bias."""
        logits, bias = super().forward(*args, **kwargs)
        assert bias is None
        return softcap(logits, self.logit_softcap), None


def softcap(values: Tensor, cap: float) -> Tensor:
    """cap * tanh(values / cap), of the shape and dtype of ``values``."""
    return torch.tanh(values / cap) * cap


class _RMSNorm(nn.Module):
    """Division by the root of the mean square, in fp32; what its weight does, its kinds say."""

    initial_weight: float

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        """Raises: ValueError: the configuration asks for another norm."""
        super().__init__()
        if config.normalization != "RMSNorm":
            raise ValueError(f"normalization: got {config.normalization!r}, expected 'RMSNorm'")
        self.eps = eps
        self.weight = nn.Parameter(torch.full((hidden_size,), self.initial_weight))
        # Its gradient is summed over tp ranks where each has some of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def normed(self, states: Tensor) -> Tensor:
        """Over the last dimension, without the weight, in fp32."""
        values = states.float()
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)


class PlainRMSNorm(_RMSNorm):
    """RMSNorm that multiplies by its weight, whatever layernorm_zero_centered_gamma says.

    For Qwen3-Next, whose delta nets have such a norm among others that multiply by 1 + weight.
    """

    initial_weight = 1.0

    def forward(self, states: Tensor) -> Tensor:
        """Normed over the last dimension; the dtype stays."""
        return (self.weight * self.normed(states).type_as(states)).type_as(states)


class ZeroCenteredRMSNorm(_RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in fp32 (layernorm_zero_centered_gamma).

    Transformer Engine has this norm; megatron-core's local WrappedTorchNorm refuses it.
    """

    initial_weight = 0.0

    def forward(self, states: Tensor) -> Tensor:
        """Normed over the last dimension; the dtype stays."""
        return (self.normed(states) * (1 + self.weight.float())).type_as(states)


class NormAfter:
    """Over a row-parallel linear: its sum over tp ranks is normed before it joins the residual."""

    def __init__(self, *args: Any, config: TransformerConfig, norm: Any, **kwargs: Any) -> None:
        """Args as those of the linear; ``norm`` is the class of the norm.

        Raises:
            ValueError: the linear has a bias, which megatron-core would add after the norm.
        """
        if kwargs.get("bias"):
            raise ValueError("add_bias_linear: got True, expected False beside norms after linears")
        super().__init__(*args, config=config, **kwargs)  # type: ignore[call-arg]
        self.post_layernorm = norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        """The normed output, [tokens, sequences, hidden], and no bias."""
        output, _ = super().forward(inputs)  # type: ignore[misc]
        return self.post_layernorm(output), None


@functools.cache
def norm_after(linear: type) -> type:
    """The row-parallel linear, local or Transformer Engine's, with ``NormAfter`` over it."""
    return type(f"NormAfter{linear.__name__}", (NormAfter, linear), {})
