"""GLM-4.5 and GLM-4.6 (transformers.Glm4MoeConfig): half-rotated heads, DeepSeek-V3's router."""

from scenarios.convert.attention import heads
from scenarios.convert.experts import dense_first, shared_experts, sigmoid_router
from scenarios.convert.family import Family, Ignored, Only
from scenarios.convert.mapping import Copy
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import (
    DENSE_DECODER,
    EXPERTS,
    HF_LAYER,
    LAYER,
    QUERY_KEY_NORMS,
    attention,
    gated_mlp,
)

FAMILY = Family(
    model_type="glm4_moe",
    table={
        "vocab_size": (151552, "gpt_model.vocab_size"),
        "hidden_size": (4096, "transformer.hidden_size"),
        "intermediate_size": (10944, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (46, "transformer.num_layers"),
        "num_attention_heads": (96, heads),
        "num_key_value_heads": (8, heads),
        "head_dim": (None, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (131072, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-5, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, "transformer.add_qkv_bias"),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "use_qk_norm": (False, "transformer.qk_layernorm"),
        "n_routed_experts": (128, sigmoid_router),
        "num_experts_per_tok": (8, sigmoid_router),
        "norm_topk_prob": (True, sigmoid_router),
        "routed_scaling_factor": (1.0, sigmoid_router),
        "n_group": (1, sigmoid_router),
        "topk_group": (1, sigmoid_router),
        "moe_intermediate_size": (1408, "transformer.moe_ffn_hidden_size"),
        "n_shared_experts": (1, shared_experts),
        "first_k_dense_replace": (1, dense_first),
        "moe_layer_freq": (None, dense_first),
        "num_nextn_predict_layers": (1, "transformer.mtp_num_layers"),
        "output_router_logits": (False, Ignored("the source adds no balance loss for this family")),
        **rope_rows(Unsaid(partial=0.5, rotates_parts=True)),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.add_bias_linear": False,
        "transformer.hidden_dropout": 0.0,
    },
    weights=DENSE_DECODER
    | attention("bias")
    | QUERY_KEY_NORMS
    | EXPERTS
    | gated_mlp("mlp.shared_experts.", "mlp.shared_experts.")
    | {f"{LAYER}mlp.router.expert_bias": Copy(f"{HF_LAYER}mlp.gate.e_score_correction_bias")},
    aliases={
        "num_mtp_layers": "num_nextn_predict_layers",
        "num_local_experts": "n_routed_experts",
    },
)
