"""Qwen2 and Qwen2.5, dense: Llama's layer with a bias on query, key and value."""

from collections.abc import Mapping
from typing import Any

from scenarios.convert.family import IRRELEVANT, ONLY, Family, Fields, Only, Together
from scenarios.convert.rope import convert_rope

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers")
NO_WINDOW = "no layer has a sliding window"


def _combine(hf: Mapping[str, Any], fields: Fields) -> None:
    heads, head_dim = hf["num_attention_heads"], hf["head_dim"]
    if head_dim is None:
        if hf["hidden_size"] % heads:
            raise ValueError(
                f"hidden_size: got {hf['hidden_size']}, expected a multiple of the {heads} heads"
            )
        head_dim = hf["hidden_size"] // heads
    groups = hf["num_key_value_heads"]
    fields.transformer["kv_channels"] = head_dim
    fields.transformer["num_query_groups"] = heads if groups is None else groups
    _precision(hf, fields)
    _window(hf, fields)
    convert_rope(hf, fields)


def _precision(hf: Mapping[str, Any], fields: Fields) -> None:
    """``torch_dtype`` is the older name of ``dtype``."""
    names = {str(hf[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if hf[key]}
    if len(names) > 1:
        raise ValueError(f"dtype and torch_dtype contradict each other: got {sorted(names)}")
    name = names.pop() if names else "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: got {name!r}, expected float32, bfloat16 or float16")
    fields.transformer |= {"bf16": name == "bfloat16", "fp16": name == "float16"}


def _window(hf: Mapping[str, Any], fields: Fields) -> None:
    """Layers from max_window_layers on see sliding_window tokens, themselves included."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    derived = [
        SLIDING if window is not None and layer >= hf["max_window_layers"] else FULL
        for layer in range(hf["num_hidden_layers"])
    ]
    layers = hf["layer_types"]
    if layers is not None and layers != derived:
        raise ValueError(
            f"layer_types: got {layers!r}, expected {derived!r} by use_sliding_window, "
            "sliding_window, max_window_layers and num_hidden_layers"
        )
    if window is None or SLIDING not in derived:
        fields.ignored |= dict.fromkeys(WINDOW_FIELDS, NO_WINDOW)
        return
    if window < 1:
        raise ValueError(f"sliding_window: got {window}, expected 1 or more tokens")
    fields.transformer["window_size"] = (window - 1, 0)
    fields.transformer["window_attn_skip_freq"] = tuple(int(kind == SLIDING) for kind in derived)


FAMILY = Family(
    model_type="qwen2",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": None,
        "rope_scaling": None,
        "rope_theta": None,
        "partial_rotary_factor": None,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "attention_dropout": 0.0,
        "dtype": None,
        "torch_dtype": None,
    },
    rules={
        "num_hidden_layers": "transformer.num_layers",
        "hidden_size": "transformer.hidden_size",
        "intermediate_size": "transformer.ffn_hidden_size",
        "num_attention_heads": "transformer.num_attention_heads",
        "rms_norm_eps": "transformer.layernorm_epsilon",
        "initializer_range": "transformer.init_method_std",
        "attention_dropout": "transformer.attention_dropout",
        "vocab_size": "gpt_model.vocab_size",
        "max_position_embeddings": "gpt_model.max_sequence_length",
        "tie_word_embeddings": "gpt_model.share_embeddings_and_output_weights",
        **dict.fromkeys(("num_key_value_heads", "head_dim", "dtype", "torch_dtype"), Together()),
        **dict.fromkeys(("use_sliding_window", "sliding_window"), Together()),
        **dict.fromkeys(("max_window_layers", "layer_types"), Together()),
        **dict.fromkeys(("rope_parameters", "rope_scaling", "rope_theta"), Together()),
        "partial_rotary_factor": Together(),
        "hidden_act": Only(("silu",), "another activation"),
        "use_mrope": Only((False, None), "multimodal rotary positions"),
        "architectures": Only(
            (None, ["Qwen2ForCausalLM"], ["Qwen2Model"]), "another head than the language model's"
        ),
        **ONLY,
    },
    irrelevant=IRRELEVANT,
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.add_bias_linear": False,
        "transformer.add_qkv_bias": True,
        "transformer.qk_layernorm": False,
        "transformer.hidden_dropout": 0.0,
    },
    combine=_combine,
)
