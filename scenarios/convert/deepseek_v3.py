"""DeepSeek-V3 and R1 (transformers.DeepseekV3Config): latent attention, sigmoid router, groups."""

from scenarios.convert.experts import dense_first, shared_experts, sigmoid_router
from scenarios.convert.family import Family, Ignored, Only
from scenarios.convert.latent import LATENT_WEIGHTS, latent_attention, latent_rope
from scenarios.convert.mapping import Copy
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import EXPERTS, HEAD, HF_LAYER, LAYER, NORMS, gated_mlp

FAMILY = Family(
    model_type="deepseek_v3",
    table={
        "vocab_size": (129280, "gpt_model.vocab_size"),
        "hidden_size": (7168, "transformer.hidden_size"),
        "intermediate_size": (18432, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (61, "transformer.num_layers"),
        "num_attention_heads": (128, latent_attention),
        "num_key_value_heads": (128, latent_attention),
        "q_lora_rank": (1536, latent_attention),
        "kv_lora_rank": (512, latent_attention),
        "qk_nope_head_dim": (128, latent_attention),
        "qk_rope_head_dim": (64, latent_attention),
        "v_head_dim": (128, latent_attention),
        "head_dim": (None, latent_attention),
        "qk_head_dim": (None, latent_attention),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (4096, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, Only((False,), "biases in latent attention")),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "rope_interleave": (True, Only((True,), "rotated halves instead of neighbours")),
        "n_routed_experts": (256, sigmoid_router),
        "num_experts_per_tok": (8, sigmoid_router),
        "norm_topk_prob": (True, sigmoid_router),
        "routed_scaling_factor": (2.5, sigmoid_router),
        "n_group": (8, sigmoid_router),
        "topk_group": (4, sigmoid_router),
        "scoring_func": ("sigmoid", Only(("sigmoid",), "another score")),
        "topk_method": ("noaux_tc", Only(("noaux_tc",), "another choice of experts")),
        "moe_intermediate_size": (2048, "transformer.moe_ffn_hidden_size"),
        "n_shared_experts": (1, shared_experts),
        "first_k_dense_replace": (3, dense_first),
        "moe_layer_freq": (1, dense_first),
        "num_nextn_predict_layers": (1, "transformer.mtp_num_layers"),
        "output_router_logits": (False, Ignored("the source adds no balance loss for this family")),
        "aux_loss_alpha": (None, Ignored("the source adds no balance loss for this family")),
        "seq_aux": (None, Ignored("the source adds no balance loss for this family")),
        "ep_size": (None, Ignored("a layout; it is chosen at the conversion")),
        **rope_rows(Unsaid(), latent_rope),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.add_bias_linear": False,
        "transformer.qk_layernorm": True,
        "transformer.hidden_dropout": 0.0,
    },
    weights=HEAD
    | NORMS
    | LATENT_WEIGHTS
    | gated_mlp()
    | EXPERTS
    | gated_mlp("mlp.shared_experts.", "mlp.shared_experts.")
    | {f"{LAYER}mlp.router.expert_bias": Copy(f"{HF_LAYER}mlp.gate.e_score_correction_bias")},
    aliases={
        "num_mtp_layers": "num_nextn_predict_layers",
        "num_local_experts": "n_routed_experts",
        "num_experts": "n_routed_experts",
    },
)
