"""Gated delta nets in a layer specification: megatron-core's own module, layer by layer.

megatron-core's specification of such blocks asks for Transformer Engine; this one takes the linear
layers of the attention that a delta net replaces, of either kind.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

NOTE = (
    "delta nets: megatron-core's own rule in torch, which it has for deterministic_mode, and "
    "flash-linear-attention's norm of queries and keys written out here"
)


def delta_net_block(
    block: Any,
    config: "TransformerConfig",
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    **_: Any,
) -> Any:
    """A block's specification with delta nets in the layers of ``linear_attention_freq``.

    Args:
        block: TransformerBlockSubmodules of the stage, with attention in every layer.
        config: the TransformerConfig.
        vp_stage: the virtual stage, as of get_gpt_decoder_block_spec.
        pp_rank: the stage.
    """
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)

    def layer_of(layer: Any) -> Any:
        inner = layer.submodules.self_attention.submodules
        parts = GatedDeltaNetSubmodules(
            in_proj=inner.linear_qkv, out_norm=block.layer_norm, out_proj=inner.linear_proj
        )
        net = ModuleSpec(GatedDeltaNet, submodules=parts)
        return replace(layer, submodules=replace(layer.submodules, self_attention=net))

    is_linear = config.linear_attention_freq[first:]
    layers = [
        layer_of(layer) if linear else layer
        for layer, linear in zip(block.layer_specs, is_linear, strict=False)
    ]
    return replace(block, layer_specs=layers)


def on_cpu() -> dict[str, Any]:
    """What megatron-core's module of delta nets looks up in place of flash-linear-attention."""
    from megatron.core.ssm import gated_delta_net

    return {
        "HAVE_FLA": True,
        "l2norm": _l2norm,
        "chunk_gated_delta_rule": gated_delta_net.torch_chunk_gated_delta_rule,
    }


def _l2norm(values: Tensor) -> Tensor:
    """Divided by its length along the last dimension, with flash-linear-attention's epsilon."""
    return values * torch.rsqrt(values.square().sum(-1, keepdim=True) + 1e-6)
