"""Small configurations of every family with unusual sizes and switches."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.convert_cases import LLAMA3

Config = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]


@st.composite
def odd(draw: Draw, model_type: str) -> Config:
    """A small configuration of the family with unusual sizes and switches."""
    return {"model_type": model_type} | _ODD[model_type](draw)


def _sizes(draw: Draw) -> Config:
    groups, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * ratio
    return {
        "vocab_size": draw(st.integers(17, 60)),
        "hidden_size": heads * draw(st.integers(8, 14)),
        "intermediate_size": draw(st.integers(5, 40)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": draw(st.integers(32, 500)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_dropout": draw(st.sampled_from([0.0, 0.25])),
    }


def _head_dim(draw: Draw) -> Config:
    return {"head_dim": 2 * draw(st.integers(1, 10))}


def _rope(draw: Draw, kinds: tuple[str, ...] = ("none", "linear", "llama3", "yarn")) -> Config:
    theta = draw(st.sampled_from([500, 10000, 1000000]))
    factor = draw(st.sampled_from([1.5, 4.0, 40.0]))
    kind = draw(st.sampled_from(kinds))
    scaling: Config | None = None
    if kind == "linear":
        scaling = {"type": "linear", "factor": factor}
    elif kind == "llama3":
        scaling = LLAMA3 | {"factor": factor}
    elif kind == "yarn":
        # transformers takes original and factor apart; they need not fit the longest position.
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": draw(st.integers(20, 200)),
            "beta_fast": draw(st.sampled_from([32.0, 8.0])),
            "beta_slow": draw(st.sampled_from([1.0, 0.5])),
        }
        if draw(st.booleans()):
            scaling |= {"mscale": 1.0, "mscale_all_dim": draw(st.sampled_from([1.0, 0.7]))}
    if draw(st.booleans()):
        scaling = {"rope_type": "default", **(scaling or {})}
        scaling["rope_type"] = scaling.pop("type", scaling["rope_type"])
        return {"rope_parameters": scaling | {"rope_theta": theta}}
    return {"rope_theta": theta, "rope_scaling": scaling}


def _window(draw: Draw) -> Config:
    use = draw(st.booleans())
    return {
        "use_sliding_window": use,
        "sliding_window": draw(st.integers(1, 9)),
        "max_window_layers": draw(st.integers(0, 4)),
    }


def _experts(draw: Draw, name: str) -> Config:
    experts = draw(st.integers(2, 7))
    return {name: experts, "num_experts_per_tok": draw(st.integers(2, experts))}


def _pattern(draw: Draw, num_layers: int) -> Config:
    step = draw(st.integers(1, num_layers))
    sparse = [i for i in range(num_layers) if (i + 1) % step == 0]
    dense = draw(st.lists(st.integers(0, num_layers - 1), unique=True, max_size=2))
    kept = dense if set(sparse) - set(dense) else []
    return {"decoder_sparse_step": step, "mlp_only_layers": kept}


def _bert(draw: Draw) -> Config:
    heads = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["PreTraining", "MaskedLM", "TokenClassification", None]))
    has_lm_head = kind in ("PreTraining", "MaskedLM")
    config = {
        "architectures": [f"BertFor{kind}" if kind else "BertModel"],
        "vocab_size": draw(st.integers(17, 60)),
        "hidden_size": heads * draw(st.integers(8, 15)),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(3, 40)),
        "hidden_act": draw(st.sampled_from(["gelu"] if has_lm_head else ["gelu", "gelu_new"])),
        "hidden_dropout_prob": draw(st.sampled_from([0.0, 0.1])),
        "attention_probs_dropout_prob": draw(st.sampled_from([0.0, 0.25])),
        "max_position_embeddings": draw(st.integers(24, 50)),
        "type_vocab_size": draw(st.integers(1, 3)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5, 1e-3])),
    }
    if kind == "TokenClassification":
        config |= {
            "id2label": {str(label): f"L{label}" for label in range(draw(st.integers(1, 5)))},
            "classifier_dropout": draw(st.none() | st.just(0.3)),
        }
    return config


def _gpt2(draw: Draw) -> Config:
    heads, dropout = draw(st.integers(1, 5)), draw(st.sampled_from([0.0, 0.1]))
    return {
        "vocab_size": draw(st.integers(17, 60)),
        "n_embd": heads * draw(st.integers(8, 15)),
        "n_head": heads,
        "n_layer": draw(st.integers(1, 4)),
        "n_inner": draw(st.none() | st.integers(3, 40)),
        "n_positions": draw(st.integers(24, 50)),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "gelu_pytorch_tanh"])),
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
    }


def _llama(draw: Draw) -> Config:
    bias = draw(st.booleans())
    config = _sizes(draw) | _rope(draw) | {"attention_bias": bias, "mlp_bias": bias}
    return config | (_head_dim(draw) if draw(st.booleans()) else _even_heads(draw, config))


def _even_heads(draw: Draw, config: Config) -> Config:
    return {"hidden_size": config["num_attention_heads"] * 2 * draw(st.integers(4, 9))}


def _mistral(draw: Draw) -> Config:
    window = draw(st.none() | st.integers(1, 9))
    return _sizes(draw) | _head_dim(draw) | _rope(draw) | {"sliding_window": window}


def _mixtral(draw: Draw) -> Config:
    return _mistral(draw) | _experts(draw, "num_local_experts")


def _qwen2(draw: Draw) -> Config:
    config = _sizes(draw) | _rope(draw) | _window(draw)
    return config | _even_heads(draw, config)


def _qwen2_moe(draw: Draw) -> Config:
    config = _qwen2(draw) | _experts(draw, "num_experts")
    return config | {
        "qkv_bias": draw(st.booleans()),
        "moe_intermediate_size": draw(st.integers(3, 20)),
        "shared_expert_intermediate_size": draw(st.integers(3, 20)),
        "norm_topk_prob": draw(st.booleans()),
        **_pattern(draw, config["num_hidden_layers"]),
    }


def _qwen2_5_vl(draw: Draw) -> Config:
    sections = draw(st.tuples(*[st.integers(1, 4)] * 3))
    config = _sizes(draw) | {"use_sliding_window": False}
    hidden = config["num_attention_heads"] * 2 * sum(sections)
    rope = {"rope_theta": 10000, "rope_scaling": {"type": "mrope", "mrope_section": [*sections]}}
    return config | {"hidden_size": hidden} | rope


def _qwen3(draw: Draw) -> Config:
    return _sizes(draw) | _head_dim(draw) | _rope(draw) | _window(draw)


def _qwen3_moe(draw: Draw) -> Config:
    config = _qwen3(draw) | _experts(draw, "num_experts")
    del config["max_window_layers"]
    return config | {
        "moe_intermediate_size": draw(st.integers(3, 20)),
        "norm_topk_prob": draw(st.booleans()),
        **_pattern(draw, config["num_hidden_layers"]),
    }


def _qwen3_next(draw: Draw) -> Config:
    config = _sizes(draw) | _rope(draw, ("none", "linear", "llama3"))
    config |= _experts(draw, "num_experts") | {"head_dim": 8 * draw(st.integers(1, 3))}
    layers, heads = config["num_hidden_layers"], draw(st.integers(1, 3))
    types = st.sampled_from(["linear_attention", "full_attention"])
    pattern = {"layer_types": draw(st.lists(types, min_size=layers, max_size=layers))}
    return config | {
        **draw(st.sampled_from([{}, pattern, {"full_attention_interval": 2}])),
        "linear_conv_kernel_dim": draw(st.integers(1, 5)),
        # Fewer numbers may all be near zero by chance, and a norm enlarges their rounding.
        "linear_key_head_dim": draw(st.integers(4, 10)),
        "linear_value_head_dim": draw(st.integers(4, 10)),
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads * draw(st.integers(1, 3)),
        "moe_intermediate_size": draw(st.integers(3, 20)),
        "shared_expert_intermediate_size": draw(st.integers(3, 20)),
        "norm_topk_prob": draw(st.booleans()),
        "partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 1.0])),
        **_pattern(draw, layers),
    }


def _phi3(draw: Draw) -> Config:
    config = _sizes(draw) | _rope(draw, ("none",))
    config |= _even_heads(draw, config)
    return config | {"sliding_window": draw(st.none() | st.integers(1, 9))}


def _latent(draw: Draw) -> Config:
    config = _sizes(draw) | _rope(draw, ("none", "yarn"))
    return config | {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": config["num_attention_heads"],
        "num_hidden_layers": draw(st.integers(2, 4)),
        "q_lora_rank": draw(st.none() | st.integers(3, 20)),
        "kv_lora_rank": draw(st.integers(3, 20)),
        "qk_nope_head_dim": draw(st.integers(1, 9)),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 5)),
        "v_head_dim": draw(st.integers(1, 12)),
        "moe_intermediate_size": draw(st.integers(3, 20)),
        "n_shared_experts": draw(st.integers(1, 2)),
        "first_k_dense_replace": draw(st.integers(0, 1)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


def _grouped(draw: Draw, best: int) -> Config:
    """Groups that the source and Megatron-LM score alike: by ``best`` experts of each."""
    groups, each = draw(st.integers(2, 4)), draw(st.integers(best, best + 2))
    chosen = draw(st.integers(1, groups))
    return {
        "n_routed_experts": groups * each,
        "n_group": groups,
        "topk_group": chosen,
        "num_experts_per_tok": max(best * chosen, 2 if best == 2 else 1),
    }


def _deepseek_v2(draw: Draw) -> Config:
    config = _latent(draw)
    # The source sees pairs as complex numbers, for which these sizes must be even.
    config |= {"kv_lora_rank": 2 * draw(st.integers(2, 10))}
    config |= {"qk_nope_head_dim": 2 * draw(st.integers(1, 5))}
    if draw(st.booleans()):
        return config | _grouped(draw, 1) | {"topk_method": "group_limited_greedy"}
    return config | _experts(draw, "n_routed_experts")


def _deepseek_v3(draw: Draw) -> Config:
    return _latent(draw) | _grouped(draw, 2) | _predictors(draw)


def _predictors(draw: Draw) -> Config:
    return {"num_nextn_predict_layers": draw(st.integers(0, 2))}


def _glm4_moe(draw: Draw) -> Config:
    config = _sizes(draw) | _grouped(draw, 2) | {"head_dim": 4 * draw(st.integers(1, 5))}
    return config | {
        **_predictors(draw),
        "num_hidden_layers": draw(st.integers(2, 4)),
        "attention_bias": draw(st.booleans()),
        "use_qk_norm": draw(st.booleans()),
        "partial_rotary_factor": draw(st.sampled_from([0.5, 1.0])),
        "rope_theta": draw(st.sampled_from([500, 1000000])),
        "moe_intermediate_size": draw(st.integers(3, 20)),
        "n_shared_experts": draw(st.integers(1, 2)),
        "first_k_dense_replace": draw(st.integers(0, 1)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


def _gpt_oss(draw: Draw) -> Config:
    config = _sizes(draw) | _head_dim(draw) | _experts(draw, "num_local_experts")
    return config | {
        **_layer_types(draw, config["num_hidden_layers"]),
        "sliding_window": draw(st.integers(1, 9)),
        "swiglu_limit": draw(st.sampled_from([0.5, 7.0])),
        **(_rope(draw, ("none", "yarn")) if draw(st.booleans()) else {}),
    }


def _layer_types(draw: Draw, layers: int) -> Config:
    types = st.sampled_from(["sliding_attention", "full_attention"])
    return {"layer_types": draw(st.none() | st.lists(types, min_size=layers, max_size=layers))}


def _gemma(draw: Draw) -> Config:
    act = draw(st.sampled_from(["gelu", "gelu_pytorch_tanh"]))
    return _sizes(draw) | _head_dim(draw) | _rope(draw) | {"hidden_act": act}


def _later_gemma(draw: Draw) -> Config:
    config = _sizes(draw) | _head_dim(draw)
    return config | {
        "query_pre_attn_scalar": draw(st.integers(1, 300)),
        "final_logit_softcapping": draw(st.sampled_from([None, 7.5, 30.0])),
        "sliding_window": draw(st.integers(1, 9)),
        **_layer_types(draw, config["num_hidden_layers"]),
    }


def _gemma2(draw: Draw) -> Config:
    cap = draw(st.sampled_from([None, 0.5, 2.0, 50.0]))
    return _later_gemma(draw) | _rope(draw) | {"attn_logit_softcapping": cap}


def _gemma3(draw: Draw) -> Config:
    rope = _rope(draw, ("none", "linear", "llama3"))
    local = draw(st.sampled_from([100, 10000]))
    if "rope_parameters" in rope:
        alone = {"rope_type": "default", "rope_theta": local}
        both = {"full_attention": rope["rope_parameters"], "sliding_attention": alone}
        rope = {"rope_parameters": both}
    else:
        if rope["rope_scaling"] is not None and "type" in rope["rope_scaling"]:
            rope["rope_scaling"]["rope_type"] = rope["rope_scaling"].pop("type")
        rope["rope_local_base_freq"] = local
    return _later_gemma(draw) | rope | {"sliding_window_pattern": draw(st.integers(1, 5))}


def _glm4(draw: Draw) -> Config:
    rope = _rope(draw, ("none", "linear", "llama3"))
    return (
        _sizes(draw)
        | rope
        | {
            "head_dim": 4 * draw(st.integers(1, 5)),
            "partial_rotary_factor": draw(st.sampled_from([0.5, 1.0])),
            "attention_bias": draw(st.booleans()),
        }
    )


def _olmoe(draw: Draw) -> Config:
    config = _sizes(draw) | _rope(draw) | _experts(draw, "num_experts")
    return config | _even_heads(draw, config) | {"norm_topk_prob": draw(st.booleans())}


_ODD: dict[str, Callable[[Draw], Config]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "phi3": _phi3,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma3": lambda draw: _gemma3(draw) | {"final_logit_softcapping": None},
    "glm4": _glm4,
    "olmoe": _olmoe,
}
