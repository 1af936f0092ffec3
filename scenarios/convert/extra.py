"""Where a model's extra modules stand in its layer specification and its GPTModel."""

from dataclasses import replace
from typing import Any

from scenarios.convert.megatron import ExtraModules, MegatronModel

NOTE = "besides megatron-core's modules ours: {}"
ZERO_CENTERED_NOTE = (
    "norms with 1 + weight are written out here: megatron-core's own need Transformer Engine"
)


def listing(model: MegatronModel) -> list[dict[str, Any]]:
    """The extra modules of a model: class, place and settings of each."""
    extra, is_bert = model.extra or ExtraModules(), model.bert is not None
    rows: list[tuple[bool, str, str, dict[str, Any]]] = [
        (
            is_bert,
            "post_norm.SumThenNorm",
            "self_attn_bda and mlp_bda of every layer, whose own norms are left out",
            {},
        ),
        (
            is_bert,
            "post_norm.NormThenDropout",
            "BertModel.embedding.embedding_dropout; BertModel.encoder.final_layernorm is none",
            {},
        ),
        (
            extra.embedding_scale is not None,
            "extra_modules.ScaledEmbedding",
            "GPTModel.embedding",
            {"embedding_scale": extra.embedding_scale},
        ),
        (
            extra.post_norms,
            "extra_modules.NormAfter",
            "self_attention.linear_proj and mlp.linear_fc2 of every layer",
            {},
        ),
        (
            extra.all_heads_qk_norm,
            "extra_attention.AllHeadsRMSNorm",
            "self_attention.q_layernorm and k_layernorm of every layer",
            {},
        ),
        (
            extra.plain_delta_norm,
            "extra_modules.PlainRMSNorm",
            "self_attention.out_norm of every layer with a delta net",
            {},
        ),
        (
            extra.local_rotary_base is not None,
            "extra_attention.GlobalAndLocalRotary",
            "GPTModel.rotary_pos_emb",
            {"local_base": extra.local_rotary_base},
        ),
        (
            extra.local_rotary_base is not None,
            "extra_attention.LocalRotaryAttention",
            "self_attention of every layer",
            {},
        ),
        (
            extra.attention_softcap is not None,
            "extra_attention.SoftCappedAttention",
            "self_attention.core_attention of every layer",
            {"softcap": extra.attention_softcap},
        ),
        (
            extra.logit_softcap is not None,
            "extra_modules.SoftCappedOutputLayer",
            "GPTModel.output_layer",
            {"logit_softcap": extra.logit_softcap},
        ),
    ]
    return [
        {"module": f"scenarios.convert.{name}", "place": place, "settings": settings}
        for needed, name, place, settings in rows
        if needed
    ]


def class_names(model: MegatronModel) -> list[str]:
    """The names of the extra modules' classes."""
    return [row["module"].rpartition(".")[2] for row in listing(model)]


def layer_spec_name(model: MegatronModel) -> str | None:
    """The object of ``layer_specs`` that every layer of the model is built by, if there is one."""
    fields = model.transformer
    if model.extra == ExtraModules(post_norms=True) and fields.num_moe_experts is None:
        return "post_norms"
    if model.extra == ExtraModules(all_heads_qk_norm=True) and fields.moe_layer_freq is None:
        return "all_heads_qk_norm_moe" if fields.num_moe_experts is not None else None
    return None


def extend_block(block: Any, extra: ExtraModules) -> Any:
    """The specification of a block of layers, with the extra modules in their places.

    Args:
        block: TransformerBlockSubmodules, local or of Transformer Engine.
        extra: the model's.
    """
    layers = [extend_layer(layer, extra, block.layer_norm) for layer in block.layer_specs]
    return replace(block, layer_specs=layers)


def extend_layer(layer: Any, extra: ExtraModules, norm: Any) -> Any:
    """The specification of one layer, with the extra modules in their places.

    Args:
        layer: ModuleSpec of a TransformerLayer.
        extra: the model's; embedding, rotations and logits are no part of a layer.
        norm: class of the norms after attention and MLP.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    from scenarios.convert.extra_attention import (
        AllHeadsRMSNorm,
        LocalRotaryAttention,
        SoftCappedAttention,
    )
    from scenarios.convert.extra_modules import PlainRMSNorm, norm_after

    if hasattr(layer.submodules.self_attention.submodules, "out_norm"):
        if not extra.plain_delta_norm:
            return layer
        net = layer.submodules.self_attention
        net = replace(net, submodules=replace(net.submodules, out_norm=PlainRMSNorm))
        return replace(layer, submodules=replace(layer.submodules, self_attention=net))

    def normed(linear: type) -> Any:
        return ModuleSpec(norm_after(linear), {"norm": norm}) if extra.post_norms else linear

    parts = layer.submodules
    attention = parts.self_attention
    inner = replace(attention.submodules, linear_proj=normed(attention.submodules.linear_proj))
    if extra.all_heads_qk_norm:
        inner = replace(
            inner,
            q_layernorm=ModuleSpec(AllHeadsRMSNorm, {"heads": "num_attention_heads"}),
            k_layernorm=ModuleSpec(AllHeadsRMSNorm, {"heads": "num_query_groups"}),
        )
    if extra.attention_softcap is not None:
        capped = ModuleSpec(SoftCappedAttention, {"softcap": extra.attention_softcap})
        inner = replace(inner, core_attention=capped)
    attention = replace(attention, submodules=inner)
    if extra.local_rotary_base is not None:
        attention = replace(attention, module=LocalRotaryAttention)
    mlp = parts.mlp
    if extra.post_norms:
        linear = normed(mlp.submodules.linear_fc2)
        mlp = replace(mlp, submodules=replace(mlp.submodules, linear_fc2=linear))
    return replace(layer, submodules=replace(parts, self_attention=attention, mlp=mlp))


def zero_center_block(block: Any) -> Any:
    """A local specification whose norms multiply by 1 + weight, which megatron-core's refuse."""
    from megatron.core.transformer.identity_op import IdentityOp

    from scenarios.convert.extra_modules import ZeroCenteredRMSNorm

    def layer_of(layer: Any) -> Any:
        parts = layer.submodules
        inner = parts.self_attention.submodules
        if inner.q_layernorm is not IdentityOp:
            inner = replace(inner, q_layernorm=ZeroCenteredRMSNorm, k_layernorm=ZeroCenteredRMSNorm)
        parts = replace(
            parts,
            input_layernorm=ZeroCenteredRMSNorm,
            pre_mlp_layernorm=ZeroCenteredRMSNorm,
            self_attention=replace(parts.self_attention, submodules=inner),
        )
        return replace(layer, submodules=parts)

    layers = [layer_of(layer) for layer in block.layer_specs]
    return replace(block, layer_specs=layers, layer_norm=ZeroCenteredRMSNorm)


def extend_model(model: Any, extra: ExtraModules) -> None:
    """Give a GPTModel, or a pipeline stage of one, the extra modules outside its layers.

    megatron-core takes no specification for them. The embedding and the output layer that it has
    built change their class, and so keep their parameters; rotations have none.
    """
    from scenarios.convert.extra_attention import GlobalAndLocalRotary
    from scenarios.convert.extra_modules import ScaledEmbedding, SoftCappedOutputLayer

    if extra.embedding_scale is not None and hasattr(model, "embedding"):
        model.embedding.__class__ = ScaledEmbedding
        model.embedding.embedding_scale = extra.embedding_scale
    if extra.local_rotary_base is not None:
        model.rotary_pos_emb = GlobalAndLocalRotary(
            model.rotary_pos_emb, model.config, extra.local_rotary_base
        )
    if extra.logit_softcap is not None and hasattr(model, "output_layer"):
        model.output_layer.__class__ = SoftCappedOutputLayer
        model.output_layer.logit_softcap = extra.logit_softcap
