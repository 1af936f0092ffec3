"""GLM-4-0414 (transformers.Glm4Config): norms on both sides, neighbours rotated in half a head."""

from scenarios.convert.attention import heads
from scenarios.convert.family import HF, Family, Fields, Only
from scenarios.convert.mapping import Copy
from scenarios.convert.rope import Unsaid, rope, rope_rows
from scenarios.convert.weight_names import (
    HEAD,
    HF_LAYER,
    LAYER,
    attention,
    sandwich_norms,
)


def rope_of_neighbours(hf: HF, fields: Fields, *, unsaid: Unsaid) -> None:
    """Rotary positions of pairs that lie side by side."""
    rope(hf, fields, unsaid=unsaid)
    if fields.gpt_model["position_embedding_type"] == "yarn":
        raise ValueError("rope type 'yarn': Megatron-LM's does not rotate neighbours")
    fields.transformer["rotary_interleaved"] = True


FAMILY = Family(
    model_type="glm4",
    table={
        "vocab_size": (151552, "gpt_model.vocab_size"),
        "hidden_size": (4096, "transformer.hidden_size"),
        "intermediate_size": (13696, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (40, "transformer.num_layers"),
        "num_attention_heads": (32, heads),
        "num_key_value_heads": (2, heads),
        "head_dim": (128, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (131072, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1.5625e-07, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (True, "transformer.add_qkv_bias"),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        **rope_rows(Unsaid(partial=0.5, rotates_parts=True), rope_of_neighbours),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.add_bias_linear": False,
        "transformer.hidden_dropout": 0.0,
        "extra.post_norms": True,
    },
    weights=HEAD
    | sandwich_norms("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    | attention()
    | attention("bias")
    | {
        f"{LAYER}mlp.linear_fc1.weight": Copy(f"{HF_LAYER}mlp.gate_up_proj.weight"),
        f"{LAYER}mlp.linear_fc2.weight": Copy(f"{HF_LAYER}mlp.down_proj.weight"),
    },
)
