"""Which parameters a converted model has, how a layout cuts them, and where they come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scenarios.convert.families import family_of
from scenarios.convert.family import Family
from scenarios.convert.mapping import Copy, Mapped, delta_net_rows
from scenarios.convert.megatron import BertArguments, MegatronModel
from scenarios.convert.weight_names import (
    BERT_LAYER,
    HF_LAYER,
    LAYER,
    PREDICTION,
    PREDICTOR_LAYER,
)

Cut = Literal["none", "rows", "columns", "gated rows"] | tuple[int, ...]
"""What tp cuts: nothing, dimension 0, dimension 1, dimension 0 of gate and of up, or of sections
of these many rows."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model, layers and experts counted over all ranks."""

    name: str
    """Megatron-LM's, as its local specification has it."""
    pattern: str
    """The name with {layer} and {expert}."""
    cut: Cut
    layer: int | None = None
    """None: before or after the layers; those of multi-token prediction count on."""
    expert: int | None = None


def parameters(model: MegatronModel) -> Iterator[Parameter]:
    """Every parameter of the model, in the order of its layers.

    A router's expert bias, which Megatron-LM keeps as a buffer, counts as one.
    """
    fields, gpt, bert = model.transformer, model.gpt_model, model.bert
    yield _outer("embedding.word_embeddings.weight", "rows")
    if gpt.position_embedding_type == "learned_absolute":
        yield _outer("embedding.position_embeddings.weight")
    if bert is not None:
        yield _outer("embedding.tokentype_embeddings.weight")
        yield from map(_outer, _linear("embedding.embedding_dropout.norm"))
    for layer in range(fields.num_layers):
        yield from _layer(model, LAYER if bert is None else BERT_LAYER, layer, layer)
    for depth in range(fields.mtp_num_layers or 0):
        layer = fields.num_layers + depth
        for name, cut in _PREDICTOR_CUTS.items():
            yield Parameter(name.format(layer=depth), name, cut, layer)
        yield from _layer(model, PREDICTOR_LAYER, layer, depth)
    if bert is None:
        yield from (_outer(f"decoder.final_layernorm.{kind}") for kind in _norm_kinds(model))
    if model.head is not None:
        yield from map(_outer, _linear("output_layer"))
    elif bert is not None:
        yield from _bert_heads(bert)
    elif not gpt.share_embeddings_and_output_weights:
        yield _outer("output_layer.weight", "rows")


def mapped(model: MegatronModel, parameter: Parameter) -> Mapped:
    """Where the parameter comes from, with {base} still in the names."""
    family = family_of(model.model_type)
    table: dict[str, Mapped] = {**family.weights, **PREDICTION}
    if model.head is not None:
        kinds = ("weight", "bias")
        table |= {f"output_layer.{kind}": Copy(f"{family.label_layer}.{kind}") for kind in kinds}
    return table[parameter.pattern.replace(PREDICTOR_LAYER, LAYER)]


def copies(model: MegatronModel, base: str) -> dict[str, str]:
    """Tensors that a Hugging Face folder may hold besides -> the one that each must equal."""
    family, fields = family_of(model.model_type), model.transformer
    (embedding,) = family.weights["embedding.word_embeddings.weight"].sources
    tied = model.gpt_model.share_embeddings_and_output_weights
    known = dict(family.copies) | ({"lm_head.weight": embedding} if tied else {})
    for depth in range(fields.mtp_num_layers or 0):
        at = HF_LAYER.replace("{layer}", str(fields.num_layers + depth))
        known[f"{at}embed_tokens.weight"] = embedding
        known[f"{at}shared_head.head.weight"] = embedding if tied else "lm_head.weight"
    return {copy.format(base=base): name.format(base=base) for copy, name in known.items()}


def source_names(family: Family, form: Mapped, parameter: Parameter, base: str) -> list[str]:
    """The Hugging Face names of one parameter."""
    return [
        name.format(base=base, layer=parameter.layer, expert=parameter.expert)
        for name in form.sources
    ]


def cut_part(tensor: Tensor, cut: Cut, rank: int, degree: int) -> Tensor:
    """The part of a whole parameter that one of ``degree`` ranks holds."""
    if cut == "none" or degree == 1:
        return tensor
    if cut == "gated rows" or isinstance(cut, tuple):
        return torch.cat([part.chunk(degree)[rank] for part in _sections(tensor, cut, 1)])
    return tensor.chunk(degree, dim=0 if cut == "rows" else 1)[rank]


def join_parts(parts: list[Tensor], cut: Cut) -> Tensor:
    """The whole parameter from the parts of all ranks; the opposite of ``cut_part``."""
    if cut == "none" or len(parts) == 1:
        return parts[0]
    if cut == "gated rows" or isinstance(cut, tuple):
        sections = zip(*(_sections(part, cut, len(parts)) for part in parts), strict=True)
        return torch.cat([part for section in sections for part in section])
    return torch.cat(parts, dim=0 if cut == "rows" else 1)


def _sections(tensor: Tensor, cut: Cut, degree: int) -> tuple[Tensor, ...]:
    """What is cut apart from each other, of the part that one of ``degree`` ranks holds."""
    if not isinstance(cut, tuple):
        return tensor.chunk(2)
    return torch.split(tensor, [rows // degree for rows in cut])


def _outer(name: str, cut: Cut = "none") -> Parameter:
    return Parameter(name, name, cut)


def _linear(name: str) -> tuple[str, str]:
    return (f"{name}.weight", f"{name}.bias")


_PREDICTOR_CUTS: dict[str, Cut] = {
    name: "rows" if name.endswith("eh_proj.weight") else "none" for name in PREDICTION
}


def _layer(model: MegatronModel, at: str, layer: int, number: int) -> Iterator[Parameter]:
    """A layer's parameters: ``at`` says where it is, as the ``number``-th there."""
    # A predictor's layer is one like the model's last.
    like = min(layer, model.transformer.num_layers - 1)
    attention = _delta_net if model.transformer.has_delta_net(like) else _attention
    mlp = _sparse if model.transformer.has_experts(like) else _dense
    body = {**_norms(model), **attention(model), **mlp(model)}
    for short, cut in body.items():
        pattern = at + short
        count = model.transformer.num_moe_experts or 0
        for expert in range(count) if "{expert}" in short else (None,):
            name = pattern.format(layer=number, expert=expert)
            yield Parameter(name, pattern, cut, layer, expert)


def _bert_heads(bert: BertArguments) -> Iterator[Parameter]:
    if bert.lm_head:
        yield from map(_outer, (*_linear("lm_head.dense"), *_linear("lm_head.layer_norm")))
        yield _outer("output_layer.bias", "rows")
    if bert.pooler:
        yield from map(_outer, _linear("pooler.dense"))
    if bert.binary_head:
        yield from map(_outer, _linear("binary_head"))


def _norm_kinds(model: MegatronModel) -> tuple[str, ...]:
    return ("weight",) if model.transformer.normalization == "RMSNorm" else ("weight", "bias")


def _norms(model: MegatronModel) -> dict[str, Cut]:
    names = ["input_layernorm", "pre_mlp_layernorm"]
    if model.bert is not None:
        names = ["self_attn_bda.norm", "mlp_bda.norm"]
    if model.extra is not None and model.extra.post_norms:
        names += ["self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm"]
    return {f"{name}.{kind}": "none" for name in names for kind in _norm_kinds(model)}


def _attention(model: MegatronModel) -> dict[str, Cut]:
    fields, at = model.transformer, "self_attention."
    if model.mla is not None:
        two_steps = model.mla.q_lora_rank is not None
        queries: dict[str, Cut] = {f"{at}linear_q_proj.weight": "rows"}
        if two_steps:
            queries = {
                f"{at}linear_q_down_proj.weight": "none",
                f"{at}q_layernorm.weight": "none",
                f"{at}linear_q_up_proj.weight": "rows",
            }
        return {
            **queries,
            f"{at}linear_kv_down_proj.weight": "none",
            f"{at}kv_layernorm.weight": "none",
            f"{at}linear_kv_up_proj.weight": "rows",
            f"{at}linear_proj.weight": "columns",
        }
    cuts: dict[str, Cut] = {f"{at}linear_qkv.weight": "rows"}
    if fields.add_qkv_bias or fields.add_bias_linear:
        cuts[f"{at}linear_qkv.bias"] = "rows"
    all_heads = model.extra is not None and model.extra.all_heads_qk_norm
    if fields.qk_layernorm or all_heads:
        cut: Cut = "rows" if all_heads else "none"
        cuts |= {f"{at}{name}_layernorm.weight": cut for name in "qk"}
    if fields.softmax_type == "learnable":
        cuts[f"{at}core_attention.softmax_offset"] = "rows"
    cuts[f"{at}linear_proj.weight"] = "columns"
    if fields.add_bias_linear:
        cuts[f"{at}linear_proj.bias"] = "none"
    return cuts


def _delta_net(model: MegatronModel) -> dict[str, Cut]:
    rows, at = delta_net_rows(model.transformer), "self_attention."
    return {
        f"{at}in_proj.weight": rows,
        f"{at}conv1d.weight": rows[:3],
        f"{at}dt_bias": "rows",
        f"{at}A_log": "rows",
        f"{at}out_norm.weight": "none",
        f"{at}out_proj.weight": "columns",
    }


def _mlp(model: MegatronModel, at: str, bias: bool) -> dict[str, Cut]:
    first: Cut = "gated rows" if model.transformer.gated_linear_unit else "rows"
    cuts: dict[str, Cut] = {f"{at}linear_fc1.weight": first, f"{at}linear_fc2.weight": "columns"}
    if bias:
        cuts |= {f"{at}linear_fc1.bias": first, f"{at}linear_fc2.bias": "none"}
    return cuts


def _dense(model: MegatronModel) -> dict[str, Cut]:
    return _mlp(model, "mlp.", model.transformer.add_bias_linear)


def _sparse(model: MegatronModel) -> dict[str, Cut]:
    fields = model.transformer
    cuts: dict[str, Cut] = {"mlp.router.weight": "none"}
    if fields.add_bias_linear:
        cuts["mlp.router.bias"] = "none"
    if fields.moe_router_enable_expert_bias:
        cuts["mlp.router.expert_bias"] = "none"
    cuts |= _mlp(model, "mlp.experts.local_experts.{expert}.", fields.add_bias_linear)
    if fields.moe_shared_expert_intermediate_size is not None:
        cuts |= _mlp(model, "mlp.shared_experts.", False)
        if fields.moe_shared_expert_gate:
            cuts["mlp.shared_experts.gate_weight"] = "none"
    return cuts
