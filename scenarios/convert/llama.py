"""Llama 1 to 3.3 (transformers.LlamaConfig)."""

from scenarios.convert.attention import heads, same_bias_everywhere
from scenarios.convert.family import Family, Only
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import DENSE_DECODER, attention, gated_mlp

FAMILY = Family(
    model_type="llama",
    table={
        "vocab_size": (32000, "gpt_model.vocab_size"),
        "hidden_size": (4096, "transformer.hidden_size"),
        "intermediate_size": (11008, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (32, "transformer.num_layers"),
        "num_attention_heads": (32, heads),
        "num_key_value_heads": (None, heads),
        "head_dim": (None, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (2048, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, same_bias_everywhere),
        "mlp_bias": (False, same_bias_everywhere),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        **rope_rows(Unsaid()),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.hidden_dropout": 0.0,
    },
    weights=DENSE_DECODER | attention("bias") | gated_mlp(kind="bias"),
)
