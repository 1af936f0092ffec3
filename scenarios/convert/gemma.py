"""Gemma 1 (transformers.GemmaConfig): scaled embeddings, norms around 1, gates by tanh-GELU."""

from scenarios.convert.attention import heads, no_attention_bias
from scenarios.convert.family import HF, Family, Fields, Only, whole
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import DENSE_DECODER

TANH_GELU = "gelu_pytorch_tanh"
CAUSAL = Only((None, False), "attention to later tokens")
CONSTANTS = {
    "transformer.normalization": "RMSNorm",
    "transformer.layernorm_zero_centered_gamma": True,
    "transformer.activation_func": "openai_gelu",
    "transformer.gated_linear_unit": True,
    "transformer.hidden_dropout": 0.0,
}
"""What all Gemmas have; openai_gelu is megatron-core's GELU by tanh."""


def scaled_embedding(hf: HF, fields: Fields) -> None:
    """hidden_size, by the square root of which embeddings are multiplied."""
    fields.transformer["hidden_size"] = whole(hf, "hidden_size")
    fields.extra["embedding_scale"] = whole(hf, "hidden_size") ** 0.5


FAMILY = Family(
    model_type="gemma",
    table={
        "vocab_size": (256000, "gpt_model.vocab_size"),
        "hidden_size": (3072, scaled_embedding),
        "intermediate_size": (24576, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (28, "transformer.num_layers"),
        "num_attention_heads": (16, heads),
        "num_key_value_heads": (16, heads),
        "head_dim": (256, heads),
        "hidden_act": (TANH_GELU, Only((TANH_GELU, "gelu"), "another activation than tanh-GELU")),
        "hidden_activation": (None, Only((None, TANH_GELU), "another activation than tanh-GELU")),
        "max_position_embeddings": (8192, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (True, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, no_attention_bias),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "use_bidirectional_attention": (None, CAUSAL),
        **rope_rows(Unsaid()),
    },
    constants=CONSTANTS,
    weights=DENSE_DECODER,
)
