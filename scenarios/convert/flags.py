"""A converted model as Megatron-LM's command-line flags, and as YAML.

The flags are those of pretrain_gpt.py beside megatron-core 0.16: ``megatron/training/arguments.py``
makes most of them from TransformerConfig's fields, and ``gpt_builders.py`` hands some to GPTModel.
A setting that the command line takes and no model gets is refused here.
"""

from typing import Any

from scenarios.convert.bert_build import bert_arguments
from scenarios.convert.extra import class_names, layer_spec_name, listing
from scenarios.convert.megatron import MegatronModel

Flag = bool | int | float | str | tuple[int | str, ...]


def flags(model: MegatronModel) -> dict[str, Flag]:
    """The model as Megatron-LM's command-line flags.

    Args:
        model: the converted model.
    Returns:
        Flag -> value, True for a switch, a tuple for several words.
    Raises:
        ValueError: the model needs a field that has no flag.
    """
    _refuse_extra_modules(model)
    _refuse_what_has_no_flag(model)
    given = _layers(model) | _attention(model) | _positions(model) | _experts(model)
    given |= _latent(model) | _cut(model)
    return {
        flag: value for flag, value in given.items() if value is not None and value is not False
    }


def words(given: dict[str, Flag]) -> list[str]:
    """The flags as a command line's words."""
    line: list[str] = []
    for flag, value in given.items():
        line.append(flag)
        if isinstance(value, tuple):
            line += map(str, value)
        elif value is not True:
            line.append(str(value))
    return line


def to_yaml(model: MegatronModel) -> str:
    """The model as YAML: TransformerConfig's fields, GPTModel's arguments, what was ignored."""
    import yaml

    return str(yaml.safe_dump(plain(model), sort_keys=False))


def plain(model: MegatronModel) -> dict[str, Any]:
    """The model as plain data: what is set and not None."""
    mla = model.mla.model_dump(exclude_none=True, mode="json") if model.mla else {}
    transformer = model.transformer.model_dump(exclude_unset=True, exclude_none=True, mode="json")
    document: dict[str, Any] = {
        "model_type": model.model_type,
        "transformer_config": "MLATransformerConfig" if mla else "TransformerConfig",
        "transformer": transformer | mla,
    }
    if model.bert is not None:
        document["bert_model"] = bert_arguments(model)
        document["bert_heads"] = model.bert.model_dump(exclude={"num_tokentypes"})
    else:
        document["gpt_model"] = model.gpt_model.model_dump(exclude_none=True, mode="json")
    if model.head is not None:
        document["token_classification"] = model.head.model_dump(mode="json")
    if extra := listing(model):
        document["extra_modules"] = extra
    return document | {"ignored": model.ignored}


BUILT_IN = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
"""MLATransformerConfig's defaults, which no flag changes."""
ACTIVATIONS = {(True, "silu"), (True, "quick_gelu"), (False, "gelu"), (False, "openai_gelu")}
"""Gated or not, and the function; openai_gelu is what the fusion of bias and GELU computes."""


def _refuse_extra_modules(model: MegatronModel) -> None:
    if model.bert is not None:
        raise ValueError(
            "BERT has no flags: --spec of pretrain_bert.py brings layers with SumThenNorm, but its "
            "BertModel keeps its embedding and its final norm; use bert_build.bert_model instead"
        )
    names = class_names(model)
    if names and layer_spec_name(model) is None:
        raise ValueError(
            f"extra modules {', '.join(names)}: no flag says where they belong (--spec names a "
            "layer without settings); use build.gpt_model instead"
        )


def _refuse_what_has_no_flag(model: MegatronModel) -> None:
    gpt, fields, mla = model.gpt_model, model.transformer, model.mla
    if model.head is not None:
        raise ValueError("a token classification head has no flags; build GPTModel instead")
    if gpt.position_embedding_type == "yarn":
        raise ValueError(
            "position_embedding_type yarn has no flags; build TransformerConfig instead"
        )
    if gpt.seq_len_interpolation_factor is not None:
        raise ValueError(
            f"seq_len_interpolation_factor: got {gpt.seq_len_interpolation_factor}; "
            "gpt_builders.py does not hand --rotary-seq-len-interpolation-factor to GPTModel; "
            "build that instead"
        )
    if gpt.rope_scaling and gpt.rope_scaling_factor != 8:
        raise ValueError(
            f"rope_scaling_factor: got {gpt.rope_scaling_factor}, expected GPTModel's 8; "
            "gpt_builders.py does not hand --rope-scaling-factor to it; build GPTModel instead"
        )
    if fields.softmax_scale is not None:
        raise ValueError(
            f"softmax_scale: got {fields.softmax_scale}, which has no flag; "
            "build TransformerConfig instead"
        )
    activation = (fields.gated_linear_unit, fields.activation_func)
    if activation not in ACTIVATIONS or (activation[1] == "openai_gelu" and not _has_bias(model)):
        raise ValueError(
            f"activation_func {fields.activation_func}, gated_linear_unit "
            f"{fields.gated_linear_unit}, add_bias_linear {fields.add_bias_linear} have no flag "
            "together; build TransformerConfig instead"
        )
    if mla is None:
        return
    if not mla.rotary_base.is_integer():
        raise ValueError(f"rotary_base: got {mla.rotary_base}, the flag takes integers only")
    for name, value in BUILT_IN.items():
        if getattr(mla, name) != value:
            raise ValueError(
                f"{name}: got {getattr(mla, name)}, which has no flag; expected {value}, "
                "or build MLATransformerConfig instead"
            )


def _has_bias(model: MegatronModel) -> bool:
    return model.transformer.add_bias_linear and model.transformer.num_moe_experts is None


def _pattern(layers: tuple[int, ...] | None) -> str | None:
    """A list as Megatron-LM evaluates it: without blanks."""
    return None if layers is None else f"[{','.join(map(str, layers))}]"


def _layers(model: MegatronModel) -> dict[str, Flag | None]:
    """What else a layer is made of."""
    spec = layer_spec_name(model)
    return {
        "--spec": None if spec is None else ("scenarios.convert.layer_specs", spec),
        "--apply-layernorm-1p": model.transformer.layernorm_zero_centered_gamma,
        "--rotary-interleaved": model.transformer.rotary_interleaved,
    }


def _attention(model: MegatronModel) -> dict[str, Flag | None]:
    fields = model.transformer
    window = fields.window_size
    gated, activation = fields.gated_linear_unit, fields.activation_func
    grouped = fields.num_query_groups != fields.num_attention_heads
    return {
        "--num-layers": fields.num_layers,
        "--hidden-size": fields.hidden_size,
        "--ffn-hidden-size": fields.ffn_hidden_size,
        "--num-attention-heads": fields.num_attention_heads,
        "--group-query-attention": grouped,
        "--num-query-groups": fields.num_query_groups if grouped else None,
        "--kv-channels": fields.kv_channels,
        "--norm-epsilon": fields.layernorm_epsilon,
        "--init-method-std": fields.init_method_std,
        "--attention-dropout": fields.attention_dropout,
        "--hidden-dropout": fields.hidden_dropout,
        "--normalization": fields.normalization,
        "--swiglu": gated and activation == "silu",
        "--quick-geglu": gated and activation == "quick_gelu",
        # The fusion is GELU by tanh; --openai-gelu is read by legacy models only.
        "--no-bias-gelu-fusion": activation in ("gelu", "quick_gelu"),
        "--activation-func-clamp-value": fields.activation_func_clamp_value,
        "--glu-linear-offset": fields.glu_linear_offset or None,
        "--disable-bias-linear": not fields.add_bias_linear,
        "--add-qkv-bias": fields.add_qkv_bias,
        "--qk-layernorm": fields.qk_layernorm,
        "--softmax-type": fields.softmax_type if fields.softmax_type != "vanilla" else None,
        "--bf16": fields.bf16,
        "--fp16": fields.fp16,
        "--window-size": None if window is None else f"{window[0]},{window[1]}",
        "--window-attn-skip-freq": _pattern(fields.window_attn_skip_freq),
        "--mtp-num-layers": fields.mtp_num_layers or None,
    }


def _positions(model: MegatronModel) -> dict[str, Flag | None]:
    gpt, sections = model.gpt_model, model.transformer.mrope_section
    base = gpt.rotary_base if model.mla is None else int(model.mla.rotary_base)
    rotary = gpt.position_embedding_type != "learned_absolute"
    return {
        "--vocab-size": gpt.vocab_size,
        # Else it would be rounded up to a multiple of 128 tp.
        "--padded-vocab-size": gpt.vocab_size,
        "--max-position-embeddings": gpt.max_sequence_length,
        "--untie-embeddings-and-output-weights": not gpt.share_embeddings_and_output_weights,
        "--position-embedding-type": gpt.position_embedding_type,
        "--rotary-base": base if rotary else None,
        "--rotary-percent": gpt.rotary_percent if rotary else None,
        "--use-rope-scaling": gpt.rope_scaling,
        "--mrope-section": sections,
    }


def _experts(model: MegatronModel) -> dict[str, Flag | None]:
    fields = model.transformer
    if fields.num_moe_experts is None:
        return {}
    return {
        "--num-experts": fields.num_moe_experts,
        "--moe-ffn-hidden-size": fields.moe_ffn_hidden_size,
        "--moe-layer-freq": _pattern(fields.moe_layer_freq),
        "--moe-shared-expert-intermediate-size": fields.moe_shared_expert_intermediate_size,
        "--moe-shared-expert-gate": fields.moe_shared_expert_gate,
        "--moe-router-topk": fields.moe_router_topk,
        "--moe-router-pre-softmax": fields.moe_router_pre_softmax,
        "--moe-router-score-function": fields.moe_router_score_function,
        "--moe-router-enable-expert-bias": fields.moe_router_enable_expert_bias,
        "--moe-router-topk-scaling-factor": fields.moe_router_topk_scaling_factor,
        "--moe-router-num-groups": fields.moe_router_num_groups,
        "--moe-router-group-topk": fields.moe_router_group_topk,
        "--moe-router-dtype": fields.moe_router_dtype,
        "--moe-aux-loss-coeff": fields.moe_aux_loss_coeff,
    }


def _latent(model: MegatronModel) -> dict[str, Flag | None]:
    if model.mla is None:
        return {}
    return {
        "--multi-latent-attention": True,
        "--q-lora-rank": model.mla.q_lora_rank,
        "--kv-lora-rank": model.mla.kv_lora_rank,
        "--qk-head-dim": model.mla.qk_head_dim,
        "--qk-pos-emb-head-dim": model.mla.qk_pos_emb_head_dim,
        "--v-head-dim": model.mla.v_head_dim,
        "--rope-type": model.mla.rope_type,
        # MLATransformerConfig refuses the fusion, which is on by itself, but for yarn.
        "--no-rope-fusion": model.mla.rope_type == "rope",
        "--rotary-scaling-factor": model.mla.rotary_scaling_factor,
        "--mscale": model.mla.mscale,
        "--mscale-all-dim": model.mla.mscale_all_dim,
    }


def _cut(model: MegatronModel) -> dict[str, Flag | None]:
    fields = model.transformer
    vpp = fields.virtual_pipeline_model_parallel_size
    experts = fields.num_moe_experts is not None
    return {
        "--tensor-model-parallel-size": fields.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": fields.pipeline_model_parallel_size,
        "--num-virtual-stages-per-pipeline-rank": vpp,
        "--decoder-first-pipeline-num-layers": fields.num_layers_in_first_pipeline_stage,
        "--decoder-last-pipeline-num-layers": fields.num_layers_in_last_pipeline_stage,
        "--context-parallel-size": fields.context_parallel_size,
        "--expert-model-parallel-size": fields.expert_model_parallel_size if experts else None,
        "--expert-tensor-parallel-size": fields.expert_tensor_parallel_size if experts else None,
        "--sequence-parallel": fields.sequence_parallel,
    }
