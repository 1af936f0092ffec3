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


class LocalRotaryAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention whose layers with a window rotate by a base of their own (Gemma 3)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int,
        *args: Any,
        local_rotary_base: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.local_rotary = None
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            self.local_rotary = RotaryEmbedding(
                config.kv_channels,
                rotary_percent=1.0,
                rotary_base=local_rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As SelfAttention's; in a layer with a window the given rotation only says the length.

        Raises:
            ValueError: a layer with a window gets no rotation, or one that is computed already.
        """
        if self.local_rotary is not None:
            if rotary_pos_emb is None:
                raise ValueError("rotary_pos_emb: got None, expected the rotation of all positions")
            packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
            parts = 1 if packed else self.pg_collection.cp.size()
            rotary_pos_emb = self.local_rotary(rotary_pos_emb.shape[0] * parts, packed_seq=packed)
        return super().forward(
            hidden_states,
            attention_mask,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )


class SoftCappedAttention(DotProductAttention):  # type: ignore[misc]
    """megatron-core's own unfused attention with scores between -softcap and softcap (Gemma 2)."""

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
