"""The text model of Qwen2.5-VL (transformers.Qwen2_5_VLTextConfig): Qwen2, rotated in sections."""

from scenarios.convert.attention import heads, window_from_layer
from scenarios.convert.family import Family, Ignored, Only
from scenarios.convert.rope import Unsaid, rope_rows, sectioned_rope
from scenarios.convert.weight_names import DENSE_DECODER, attention

_VISION = Ignored("belongs to the vision model; the text model is converted")
FAMILY = Family(
    model_type="qwen2_5_vl",
    table={
        "vocab_size": (152064, "gpt_model.vocab_size"),
        "hidden_size": (8192, "transformer.hidden_size"),
        "intermediate_size": (29568, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (80, "transformer.num_layers"),
        "num_attention_heads": (64, heads),
        "num_key_value_heads": (8, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (32768, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-5, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "use_sliding_window": (False, window_from_layer),
        "sliding_window": (4096, window_from_layer),
        "max_window_layers": (80, window_from_layer),
        "layer_types": (None, window_from_layer),
        **rope_rows(Unsaid(theta=1000000.0), sectioned_rope),
        **dict.fromkeys(("vision_config", "image_token_id", "video_token_id"), (None, _VISION)),
        **dict.fromkeys(("vision_start_token_id", "vision_end_token_id"), (None, _VISION)),
        "vision_token_id": (None, _VISION),
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
    text_part="text_config",
    bases=("model.language_model.", "model."),
    other_tensors=("visual.", "model.visual."),
)
