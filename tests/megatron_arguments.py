"""Megatron-LM's argument parser, as far as it says what a model is, derived from megatron-core.

megatron-core's package leaves ``megatron.training`` out. Source: Megatron-LM core_v0.16,
``megatron/training/argument_utils.py`` (a flag for each field of TransformerConfig, by its type and
its ``argparse_meta``) and ``megatron/training/arguments.py`` (the fields without one, the flags
besides, what validate_args changes, core_transformer_config_from_args). ``gpt_builders.py`` says
what GPTModel gets.
"""

import argparse
import dataclasses
import re
import types
import typing
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F

# _add_network_size_args, "exclude": fields of TransformerConfig that have no flag of their own.
_NAMES = """
timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func
_cpu_offloading_context init_method output_layer_init_method embedding_init_method
activation_func pipeline_model_parallel_layout window_size window_attn_skip_freq no_rope_freq
moe_layer_freq linear_attention_freq moe_router_load_balancing_type moe_aux_loss_coeff
cp_comm_type cuda_graph_scope virtual_pipeline_model_parallel_size params_dtype enable_autocast
autocast_dtype num_microbatches_with_partial_activation_checkpoints tp_comm_overlap_disable_qkv
tp_comm_overlap_disable_fc1 pipeline_dtype variable_seq_lengths batch_p2p_comm batch_p2p_sync
deallocate_pipeline_outputs cpu_offloading cpu_offloading_activations cpu_offloading_weights
cpu_offloading_double_buffering num_layers_in_first_pipeline_stage
num_layers_in_last_pipeline_stage softmax_scale gated_linear_unit bias_activation_fusion
activation_func_fp8_input_store test_mode memory_efficient_layer_norm fused_single_qkv_rope
fp8_dot_product_attention fp8_multi_head_attention tp_only_amax_red use_kitchen
moe_token_dropping cuda_graph_use_single_mempool cuda_graph_retain_backward_graph
disable_parameter_transpose_cache inference_sampling_seed use_inference_optimized_layers
heterogeneous_block_specs hetereogenous_dist_checkpoint quant_recipe tp_comm_atomic_ag
tp_comm_atomic_rs moe_router_topk_limited_devices inference_rng_tracker use_te_rng_tracker
log_max_attention_logit barrier_with_L1_time num_moe_experts fp8_param
gradient_accumulation_fusion overlap_p2p_comm attention_softmax_in_fp32 masked_softmax_fusion
persist_layer_norm bias_dropout_fusion apply_rope_fusion
"""
WITHOUT_FLAG = frozenset(_NAMES.split())


def tuple_type(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("()").split(","))


def freq_type(text: str) -> Any:
    """A number, or a list; _eval_pattern lets only these characters through."""
    if "[" not in text:
        return int(text)
    if re.search(r"[^,\d\[\]()+*]", text):
        raise ValueError(f"Invalid pattern: {text}")
    return eval(text)


SWITCH: dict[str, Any] = {"action": "store_true"}
POSITIONS = ["learned_absolute", "rope", "mrope", "relative", "none"]
BESIDES: dict[str, dict[str, Any]] = {
    # _add_network_size_args
    "--group-query-attention": SWITCH,
    "--window-size": {"type": tuple_type},
    "--window-attn-skip-freq": {"type": freq_type},
    "--max-position-embeddings": {"type": int},
    "--position-embedding-type": {"choices": POSITIONS, "default": "learned_absolute"},
    "--rotary-base": {"type": int, "default": 10000},
    "--rotary-percent": {"type": float, "default": 1.0},
    "--rotary-seq-len-interpolation-factor": {"type": int},
    "--use-rope-scaling": SWITCH,
    "--rope-scaling-factor": {"type": float, "default": 8.0},
    "--openai-gelu": SWITCH,
    "--squared-relu": SWITCH,
    "--swiglu": SWITCH,
    "--quick-geglu": SWITCH,
    "--untie-embeddings-and-output-weights": SWITCH,
    # _add_training_args
    "--no-bias-gelu-fusion": {"action": "store_false", "dest": "bias_gelu_fusion"},
    "--no-bias-swiglu-fusion": {"action": "store_false", "dest": "bias_swiglu_fusion"},
    "--no-rope-fusion": {"action": "store_false", "dest": "apply_rope_fusion"},
    "--rope-type": {"choices": ["rope", "yarn"]},
    # _add_distributed_args
    "--decoder-first-pipeline-num-layers": {"type": int},
    "--decoder-last-pipeline-num-layers": {"type": int},
    "--num-virtual-stages-per-pipeline-rank": {"type": int},
    # _add_tokenizer_args
    "--vocab-size": {"type": int},
    "--padded-vocab-size": {"type": int},
    # _add_experimental_args
    "--spec": {"nargs": "*"},
    # _add_moe_args
    "--num-experts": {"type": int},
    "--moe-layer-freq": {"type": freq_type, "default": 1},
    "--moe-aux-loss-coeff": {"type": float, "nargs": "+", "default": 0.0},
    # _add_mla_args
    "--q-lora-rank": {"type": int},
    "--kv-lora-rank": {"type": int, "default": 32},
    "--qk-head-dim": {"type": int, "default": 128},
    "--qk-pos-emb-head-dim": {"type": int, "default": 64},
    "--v-head-dim": {"type": int, "default": 128},
    "--rotary-scaling-factor": {"type": float, "default": 1.0},
    "--mscale": {"type": float, "default": 1.0},
    "--mscale-all-dim": {"type": float, "default": 0.0},
}


class Refused(Exception):
    """The parser exits, and says this."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise Refused(message)


def parser() -> argparse.ArgumentParser:
    """Every flag of a field of TransformerConfig, and those besides that concern a model."""
    from megatron.core.transformer import TransformerConfig

    made = _Parser(allow_abbrev=False)
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    assert fields.keys() >= WITHOUT_FLAG, "another version's list"
    for name, field in fields.items():
        if name not in WITHOUT_FLAG:
            names, choices = _flag_of(field)
            made.add_argument(*names, dest=name, **choices)
    for flag, choices in BESIDES.items():
        made.add_argument(flag, **choices)
    return made


def _flag_of(field: Any) -> tuple[list[str], dict[str, Any]]:
    dashed, default = field.name.replace("_", "-"), field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    names = [f"--{dashed}"]
    choices = {"default": default} | _type(field.type)
    if choices.get("type") is bool:
        choices = {"default": default, "action": "store_false" if default else "store_true"}
        names = [f"--no-{dashed}", f"--disable-{dashed}"] if default else names
    meta = dict(field.metadata.get("argparse_meta", {}))
    return meta.pop("arg_names", names), choices | meta


def _type(kind: Any) -> dict[str, Any]:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        assert len(inner) == 2, kind
        return _type(inner[0])
    if origin is list:
        return _type(inner[0]) | {"nargs": "+"}
    if origin is typing.Literal:
        return {"type": type(inner[0]), "choices": inner}
    assert origin is None, kind
    return {"type": kind}


def validated(args: Namespace) -> Namespace:
    """What validate_args changes of it."""
    args.params_dtype = torch.float32
    if args.fp16 or args.bf16:
        args.params_dtype = torch.float16 if args.fp16 else torch.bfloat16
    if args.expert_tensor_parallel_size is None:
        args.expert_tensor_parallel_size = args.tensor_model_parallel_size
    stages = args.num_virtual_stages_per_pipeline_rank
    args.virtual_pipeline_model_parallel_size = None if stages == 1 else stages
    args.sequence_parallel = args.sequence_parallel and args.tensor_model_parallel_size > 1
    if args.add_bias_linear:
        args.add_qkv_bias = True
    else:
        args.bias_gelu_fusion = False
    if args.position_embedding_type != "rope":
        args.apply_rope_fusion = False
    assert args.mrope_section is not None or args.position_embedding_type != "mrope"
    if isinstance(args.moe_aux_loss_coeff, list) and len(args.moe_aux_loss_coeff) == 1:
        (args.moe_aux_loss_coeff,) = args.moe_aux_loss_coeff
    assert not args.mtp_num_layers or args.position_embedding_type in ("rope", "none")
    assert not (args.multi_latent_attention and args.group_query_attention)
    return args


def core_config(args: Namespace, **settings: Any) -> Any:
    """core_transformer_config_from_args; ``settings`` go before what the arguments say."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if args.multi_latent_attention else TransformerConfig
    names = [field.name for field in dataclasses.fields(kind)]
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    values |= {
        "pipeline_dtype": args.params_dtype,
        "num_moe_experts": args.num_experts,
        "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "bias_activation_fusion": args.bias_swiglu_fusion if args.swiglu else args.bias_gelu_fusion,
    }
    if args.swiglu:
        values |= {"activation_func": F.silu, "gated_linear_unit": True}
    if args.quick_geglu:
        values |= {"activation_func": quick_gelu, "gated_linear_unit": True}
    if args.rope_type is None:
        values.pop("rope_type", None)
    else:
        assert args.multi_latent_attention or args.rope_type == "rope"
    return kind(**(values | settings))


def gpt_arguments(args: Namespace) -> dict[str, Any]:
    """What gpt_builders.py hands to GPTModel besides configuration and specification."""
    return {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "rotary_base": args.rotary_base,
        "rope_scaling": args.use_rope_scaling,
    }
