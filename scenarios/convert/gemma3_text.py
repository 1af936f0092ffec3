"""Gemma 3, the text model (transformers.Gemma3TextConfig): Gemma 2 without a cap on scores, with
norms on queries and keys and two rotations.
"""

from collections.abc import Mapping
from typing import Any

from scenarios.convert.attention import (
    FULL,
    SLIDING,
    heads,
    no_attention_bias,
    window_pattern,
)
from scenarios.convert.family import HF, Family, Fields, Ignored, Only, whole
from scenarios.convert.gemma import CAUSAL, CONSTANTS, TANH_GELU, scaled_embedding
from scenarios.convert.gemma2 import SANDWICH_NORMS, cap_logits, score_scale
from scenarios.convert.rope import Unsaid, default_base, rope
from scenarios.convert.weight_names import DENSE_DECODER, QUERY_KEY_NORMS

GLOBAL, LOCAL = Unsaid(theta=1000000.0), Unsaid(theta=10000.0)


def windows_but_every_nth(hf: HF, fields: Fields) -> None:
    """layer_types, or full attention on every sliding_window_pattern-th layer."""
    every, layers = whole(hf, "sliding_window_pattern"), whole(hf, "num_hidden_layers")
    if hf["layer_types"] is not None:
        fields.ignored["sliding_window_pattern"] = "layer_types says which layers have a window"
    elif every > layers:
        reason = "no layer is the last of so many: all have a window"
        fields.ignored["sliding_window_pattern"] = reason
    window_pattern(hf, fields, [SLIDING if (i + 1) % every else FULL for i in range(layers)])


def two_rotations(hf: HF, fields: Fields) -> None:
    """Layers with a window rotate by a base of their own, without scaling.

    transformers 5 writes rope_parameters for each kind of layer; 4 has rope_theta and rope_scaling
    for full attention, rope_local_base_freq for layers with a window.
    """
    given = hf["rope_parameters"] if hf["rope_parameters"] is not None else {}
    if not isinstance(given, Mapping) or {*given} - {FULL, SLIDING}:
        raise ValueError(
            f"rope_parameters: got {given!r}, expected objects {FULL!r} and {SLIDING!r}"
        )
    scaling = hf["rope_scaling"]
    if isinstance(scaling, Mapping) and scaling and "rope_type" not in scaling:
        raise ValueError(
            f"rope_scaling: got {scaling!r}, expected rope_type: 'type' counts in transformers 4 "
            "and not in 5"
        )
    rope({**hf, "rope_parameters": given.get(FULL)}, fields, unsaid=GLOBAL)
    if fields.gpt_model["position_embedding_type"] == "yarn":
        raise ValueError(
            "rope type 'yarn': Megatron-LM's factor on cos and sin would count in layers with a "
            "window, too; expected default, linear or llama3"
        )
    alone: dict[str, Any] = {
        "rope_parameters": given.get(SLIDING),
        "rope_scaling": None,
        "rope_theta": hf["rope_local_base_freq"],
        "partial_rotary_factor": None,
    }
    fields.extra["local_rotary_base"] = default_base(alone, unsaid=LOCAL)


FAMILY = Family(
    model_type="gemma3_text",
    table={
        "vocab_size": (262208, "gpt_model.vocab_size"),
        "hidden_size": (2304, scaled_embedding),
        "intermediate_size": (9216, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (26, "transformer.num_layers"),
        "num_attention_heads": (8, heads),
        "num_key_value_heads": (4, heads),
        "head_dim": (256, heads),
        "hidden_activation": (TANH_GELU, Only((TANH_GELU,), "another activation than tanh-GELU")),
        "max_position_embeddings": (131072, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (True, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, no_attention_bias),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "query_pre_attn_scalar": (256, score_scale),
        "attn_logit_softcapping": (
            *(None, Only((None,), "capped scores, which the source's class does not compute")),
        ),
        "final_logit_softcapping": (None, cap_logits),
        "sliding_window": (4096, windows_but_every_nth),
        "sliding_window_pattern": (6, windows_but_every_nth),
        "layer_types": (None, windows_but_every_nth),
        "_sliding_window_pattern": (None, Ignored("what layer_types was made from")),
        "cache_implementation": (None, Ignored("a setting of text generation")),
        "use_bidirectional_attention": (None, CAUSAL),
        "rope_parameters": (None, two_rotations),
        "rope_scaling": (None, two_rotations),
        "rope_theta": (None, two_rotations),
        "rope_local_base_freq": (None, two_rotations),
        "partial_rotary_factor": (None, two_rotations),
    },
    constants=CONSTANTS | {"transformer.qk_layernorm": True, "extra.post_norms": True},
    weights=DENSE_DECODER | SANDWICH_NORMS | QUERY_KEY_NORMS,
)
