"""Mistral 7B, Nemo and Small (transformers.MistralConfig): Llama with a window on every layer."""

from scenarios.convert.attention import heads, one_window
from scenarios.convert.family import Family, Only
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import DENSE_DECODER

FAMILY = Family(
    model_type="mistral",
    table={
        "vocab_size": (32000, "gpt_model.vocab_size"),
        "hidden_size": (4096, "transformer.hidden_size"),
        "intermediate_size": (14336, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (32, "transformer.num_layers"),
        "num_attention_heads": (32, heads),
        "num_key_value_heads": (8, heads),
        "head_dim": (None, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (131072, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "sliding_window": (4096, one_window),
        "layer_types": (None, Only((None,), "a window on some layers only")),
        **rope_rows(Unsaid()),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.add_bias_linear": False,
        "transformer.hidden_dropout": 0.0,
    },
    weights=DENSE_DECODER,
)
