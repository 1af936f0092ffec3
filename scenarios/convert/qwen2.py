"""Qwen2 and Qwen2.5, dense (transformers.Qwen2Config): Llama with query, key and value biases."""

from scenarios.convert.attention import heads, window_from_layer
from scenarios.convert.family import Family, Only
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import DENSE_DECODER, attention

FAMILY = Family(
    model_type="qwen2",
    table={
        "vocab_size": (151936, "gpt_model.vocab_size"),
        "hidden_size": (4096, "transformer.hidden_size"),
        "intermediate_size": (22016, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (32, "transformer.num_layers"),
        "num_attention_heads": (32, heads),
        "num_key_value_heads": (32, heads),
        "head_dim": (None, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (32768, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "use_sliding_window": (False, window_from_layer),
        "sliding_window": (4096, window_from_layer),
        "max_window_layers": (28, window_from_layer),
        "layer_types": (None, window_from_layer),
        "use_mrope": (False, Only((False, None), "multimodal rotary positions")),
        **rope_rows(Unsaid()),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.add_bias_linear": False,
        "transformer.add_qkv_bias": True,
        "transformer.hidden_dropout": 0.0,
    },
    weights=DENSE_DECODER | attention("bias"),
)
