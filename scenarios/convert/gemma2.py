"""Gemma 2 (transformers.Gemma2Config): norms on both sides, capped scores and logits, windows."""

from scenarios.convert.attention import heads, no_attention_bias, windows_in_turn
from scenarios.convert.every_family import labels_tokens
from scenarios.convert.family import HF, Family, Fields, Ignored, Only, number
from scenarios.convert.gemma import CAUSAL, CONSTANTS, TANH_GELU, scaled_embedding
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import DENSE_DECODER, sandwich_norms

SANDWICH_NORMS = sandwich_norms(
    "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


def score_scale(hf: HF, fields: Fields) -> None:
    """Scores of attention are divided by sqrt(query_pre_attn_scalar)."""
    scalar = number(hf, "query_pre_attn_scalar")
    if scalar <= 0:
        raise ValueError(f"query_pre_attn_scalar: got {scalar}, expected a positive number")
    fields.transformer["softmax_scale"] = scalar**-0.5


def cap_logits(hf: HF, fields: Fields) -> None:
    """final_logit_softcapping, of a vocabulary's logits alone."""
    if labels_tokens(hf):
        fields.ignored["final_logit_softcapping"] = "logits of labels are not capped"
    else:
        fields.extra["logit_softcap"] = _cap(hf, "final_logit_softcapping")


def cap_scores(hf: HF, fields: Fields) -> None:
    """attn_logit_softcapping."""
    fields.extra["attention_softcap"] = _cap(hf, "attn_logit_softcapping")


def _cap(hf: HF, name: str) -> float | None:
    if hf[name] is None:
        return None
    cap = number(hf, name)
    if cap <= 0:
        raise ValueError(f"{name}: got {cap}, expected a positive number or none")
    return cap


FAMILY = Family(
    model_type="gemma2",
    table={
        "vocab_size": (256000, "gpt_model.vocab_size"),
        "hidden_size": (2304, scaled_embedding),
        "intermediate_size": (9216, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (26, "transformer.num_layers"),
        "num_attention_heads": (8, heads),
        "num_key_value_heads": (4, heads),
        "head_dim": (256, heads),
        "hidden_activation": (TANH_GELU, Only((TANH_GELU,), "another activation than tanh-GELU")),
        "hidden_act": (None, Ignored("the source's class reads hidden_activation")),
        "max_position_embeddings": (8192, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (True, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, no_attention_bias),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "query_pre_attn_scalar": (256, score_scale),
        "attn_logit_softcapping": (50.0, cap_scores),
        "final_logit_softcapping": (30.0, cap_logits),
        "sliding_window": (4096, windows_in_turn),
        "layer_types": (None, windows_in_turn),
        "sliding_window_size": (None, Ignored("the source's class reads sliding_window")),
        "cache_implementation": (None, Ignored("a setting of text generation")),
        "use_bidirectional_attention": (None, CAUSAL),
        **rope_rows(Unsaid()),
    },
    constants=CONSTANTS | {"extra.post_norms": True},
    weights=DENSE_DECODER | SANDWICH_NORMS,
)
