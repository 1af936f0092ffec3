"""Parts of attention that megatron-core 0.16.1 has not: a norm over all heads, a second rotation,
capped scores.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor, nn

from scenarios.convert.extra_modules import softcap


class AllHeadsRMSNorm(nn.Module):
    """One RMSNorm over the numbers of all heads together (OLMoE), in fp32.

    A rank has its heads' part of the weight. The sum of squares goes over the tp group, and so
    does its gradient.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        heads: str,
        tp_group: Any = None,
    ) -> None:
        """Takes what SelfAttention gives its q_layernorm and k_layernorm, and besides:

        Args:
            config: has the number of heads.
            hidden_size: of one head.
            eps: added to the mean square.
            heads: field of the configuration that counts them, num_attention_heads or
                num_query_groups.
            tp_group: ranks over which the heads are cut; none: megatron-core's.
        Raises:
            ValueError: the ranks do not divide the heads.
        """
        super().__init__()
        self.eps = eps
        self.tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        num_heads, tp = getattr(config, heads), self.tp_group.size()
        if num_heads % tp:
            raise ValueError(f"{heads}: got {num_heads}, expected a multiple of tp {tp}")
        self.numel = num_heads * hidden_size
        self.weight = nn.Parameter(torch.ones(num_heads // tp * hidden_size))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Norm a rank's queries or keys.

        Args:
            states: [tokens, sequences, heads / tp, head size].
        Returns:
            The same shape and dtype.
        """
        values = states.float()
        squares = values.square().sum((-2, -1), keepdim=True)  # [tokens, sequences, 1, 1]
        # Summed over ranks on the way forth by the one function, on the way back by the other.
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        values = values * torch.rsqrt(squares / self.numel + self.eps)
        return (values.type_as(states) * self.weight.view(states.shape[-2:])).type_as(states)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """For megatron-core's distributed checkpoints: the weight is cut along dimension 0."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


class GlobalAndLocalRotary(nn.Module):
    """Two rotations for one GPTModel, side by side: its own, and one for layers with a window."""

    def __init__(self, rotary: RotaryEmbedding, config: TransformerConfig, local_base: int) -> None:
        """Args: the model's RotaryEmbedding, its configuration, the other rotation's base."""
        super().__init__()
        self.rotary = rotary
        self.local_rotary = RotaryEmbedding(
            config.kv_channels,
            rotary_percent=1.0,
            rotary_base=local_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=rotary.cp_group,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Angles, [tokens / cp, 1, 1, 2 * head size]: the model's, then the local ones."""
        return torch.cat([self.rotary(*args, **kwargs), self.local_rotary(*args, **kwargs)], -1)

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """How many positions GPTModel asks for."""
        length: int = self.rotary.get_rotary_seq_len(*args, **kwargs)
        return length

    def get_cos_sin(self, *_: Any) -> None:
        """Raises: ValueError: flash decoding takes one rotation for all layers."""
        raise ValueError("flash_decode: got True, expected False where layers rotate differently")


class LocalRotaryAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention that takes its layer's part of ``GlobalAndLocalRotary`` (Gemma 3)."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As SelfAttention's.

        Raises:
            ValueError: ``rotary_pos_emb`` is not what ``GlobalAndLocalRotary`` gives.
        """
        width = 2 * self.config.kv_channels
        if rotary_pos_emb is None or rotary_pos_emb.shape[-1] != width:
            got = None if rotary_pos_emb is None else rotary_pos_emb.shape[-1]
            raise ValueError(
                f"rotary_pos_emb: got {got} angles of a head, expected {width}: two rotations"
            )
        is_local = is_layer_window_attention(
            self.config.window_size, self.config.window_attn_skip_freq, self.layer_number
        )
        rotation = rotary_pos_emb.chunk(2, dim=-1)[is_local].contiguous()
        return super().forward(
            hidden_states, attention_mask, *args, rotary_pos_emb=rotation, **kwargs
        )


class SoftCappedAttention(DotProductAttention):  # type: ignore[misc]
    """megatron-core's own unfused attention with scores between -softcap and softcap (Gemma 2)."""

    scale_mask_softmax: nn.Module

    def __init__(
        self, config: TransformerConfig, *args: Any, softcap: float, **kwargs: Any
    ) -> None:
        """Raises: ValueError: scores are scaled by the layer's number, too."""
        super().__init__(config, *args, **kwargs)
        if config.apply_query_key_layer_scaling:
            raise ValueError("apply_query_key_layer_scaling: got True, expected False")
        self.scale_mask_softmax = _CappedSoftmax(self.scale_mask_softmax, softcap)


class _CappedSoftmax(nn.Module):
    """Caps scores before they are masked."""

    def __init__(self, softmax: nn.Module, cap: float) -> None:
        super().__init__()
        self.softmax, self.cap = softmax, cap

    def forward(self, scores: Tensor, *args: Any) -> Tensor:
        """Weights of the same shape, [sequences, heads, queries, keys]."""
        weights: Tensor = self.softmax(softcap(scores, self.cap), *args)
        return weights
