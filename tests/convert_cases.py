"""Configurations of every family: its class's defaults, a published size, and odd ones."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Config = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]

# What a class's own defaults lack for a model that can be run.
DEFAULT: dict[str, Config] = {
    "bert": {},
    "gpt2": {},
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_5_vl": {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
    "qwen3": {},
    "qwen3_moe": {},
    "phi3": {},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "deepseek_v3": {},
    "glm4_moe": {"head_dim": 128},
    "gpt_oss": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3": {},
    "glm4": {},
    "olmoe": {},
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}

# The models' config.json on huggingface.co, as their cards publish them.
PUBLISHED: dict[str, tuple[str, Config]] = {
    "bert": (
        "google-bert/bert-large-uncased, with the class that its original checkpoint was made by",
        {
            "architectures": ["BertForPreTraining"],
            "attention_probs_dropout_prob": 0.1,
            "gradient_checkpointing": False,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 1024,
            "initializer_range": 0.02,
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "pad_token_id": 0,
            "position_embedding_type": "absolute",
            "type_vocab_size": 2,
            "vocab_size": 30522,
        },
    ),
    "gpt2": (
        "openai-community/gpt2-xl",
        {"n_embd": 1600, "n_head": 25, "n_layer": 48, "n_positions": 1024, "vocab_size": 50257},
    ),
    "llama": (
        "meta-llama/Llama-3.1-8B",
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3,
            "torch_dtype": "bfloat16",
        },
    ),
    "mistral": (
        "mistralai/Mistral-7B-v0.1",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
        },
    ),
    "mixtral": (
        "mistralai/Mixtral-8x7B-v0.1",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1e6,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        },
    ),
    "qwen2": (
        "Qwen/Qwen2.5-7B",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "use_mrope": False,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": 28,
        },
    ),
    "qwen2_moe": (
        "Qwen/Qwen1.5-MoE-A2.7B",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "rope_theta": 1000000.0,
            "max_window_layers": 21,
            "max_position_embeddings": 8192,
        },
    ),
    "qwen2_5_vl": (
        "Qwen/Qwen2.5-VL-7B-Instruct",
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "max_window_layers": 28,
            "sliding_window": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {"depth": 32, "hidden_size": 1280},
            "vision_start_token_id": 151652,
            "vision_token_id": 151654,
        },
    ),
    "qwen3": (
        "Qwen/Qwen3-8B",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "rope_theta": 1000000,
            "sliding_window": None,
        },
    ),
    "qwen3_moe": (
        "Qwen/Qwen3-30B-A3B",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "rope_theta": 1000000.0,
        },
    ),
    "phi3": (
        "microsoft/Phi-3-mini-4k-instruct",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_key_value_heads": 32,
            "sliding_window": 2047,
            "rope_scaling": None,
            "attention_bias": False,
        },
    ),
    "deepseek_v2": (
        "deepseek-ai/DeepSeek-V2-Lite",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "max_position_embeddings": 163840,
            "rope_theta": 10000,
            "rope_scaling": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": (
        "deepseek-ai/DeepSeek-V3, without its quantization_config",
        {
            "ep_size": 1,
            "first_k_dense_replace": 3,
            "max_position_embeddings": 163840,
            "num_nextn_predict_layers": 1,
            "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
    ),
    "glm4_moe": (
        "zai-org/GLM-4.5-Air",
        {
            "head_dim": 128,
            "attention_bias": True,
            "use_qk_norm": False,
            "partial_rotary_factor": 0.5,
            "rope_theta": 1000000,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "num_nextn_predict_layers": 1,
        },
    ),
    "gpt_oss": (
        "openai/gpt-oss-20b",
        {
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "experts_per_token": 4,
            "initial_context_length": 4096,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "rope_theta": 150000,
            "swiglu_limit": 7.0,
        },
    ),
    "gemma": (
        "google/gemma-2b",
        {
            "architectures": ["GemmaForCausalLM"],
            "hidden_act": "gelu",
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "rope_scaling": None,
            "rope_theta": 10000.0,
        },
    ),
    "gemma2": (
        "google/gemma-2-27b",
        {
            "architectures": ["Gemma2ForCausalLM"],
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 128,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_hidden_layers": 46,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
        },
    ),
    "gemma3_text": (
        "google/gemma-3-1b-it",
        {
            "architectures": ["Gemma3ForCausalLM"],
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
    ),
    "gemma3": (
        "google/gemma-3-4b-it",
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
            "initializer_range": 0.02,
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
    ),
    "glm4": (
        "zai-org/GLM-4-9B-0414",
        {
            "architectures": ["Glm4ForCausalLM"],
            "attention_bias": True,
            "max_position_embeddings": 32768,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
        },
    ),
    "olmoe": (
        "allenai/OLMoE-1B-7B-0924",
        {
            "architectures": ["OlmoeForCausalLM"],
            "clip_qkv": None,
            "intermediate_size": 1024,
            "num_key_value_heads": 16,
            "rope_scaling": None,
            "rope_theta": 10000.0,
        },
    ),
}


def published(model_type: str) -> Config:
    """The published size as a configuration."""
    return {"model_type": model_type, **PUBLISHED[model_type][1]}


def default(model_type: str) -> Config:
    """The class's defaults as a configuration."""
    return {"model_type": model_type, **DEFAULT[model_type]}


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
