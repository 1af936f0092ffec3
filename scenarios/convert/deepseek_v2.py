"""DeepSeek-V2 and V2-Lite (transformers.DeepseekV2Config): latent attention, softmax router."""

from scenarios.convert.experts import dense_first, group_limited_softmax_router, shared_experts
from scenarios.convert.family import Family, Ignored, Only
from scenarios.convert.latent import LATENT_WEIGHTS, latent_attention, latent_rope
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import EXPERTS, HEAD, NORMS, gated_mlp

FAMILY = Family(
    model_type="deepseek_v2",
    table={
        "vocab_size": (102400, "gpt_model.vocab_size"),
        "hidden_size": (4096, "transformer.hidden_size"),
        "intermediate_size": (11008, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (32, "transformer.num_layers"),
        "num_attention_heads": (32, latent_attention),
        "num_key_value_heads": (None, latent_attention),
        "q_lora_rank": (1536, latent_attention),
        "kv_lora_rank": (512, latent_attention),
        "qk_nope_head_dim": (128, latent_attention),
        "qk_rope_head_dim": (64, latent_attention),
        "v_head_dim": (128, latent_attention),
        "head_dim": (None, latent_attention),
        "qk_head_dim": (None, latent_attention),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (2048, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, Only((False,), "biases in latent attention")),
        "mlp_bias": (False, Only((False,), "biases in the MLP alone")),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "n_routed_experts": (64, group_limited_softmax_router),
        "num_experts_per_tok": (None, group_limited_softmax_router),
        "norm_topk_prob": (False, group_limited_softmax_router),
        "routed_scaling_factor": (1.0, group_limited_softmax_router),
        "topk_method": ("greedy", group_limited_softmax_router),
        "n_group": (None, group_limited_softmax_router),
        "topk_group": (None, group_limited_softmax_router),
        "scoring_func": ("softmax", Only(("softmax",), "another score")),
        "moe_intermediate_size": (1407, "transformer.moe_ffn_hidden_size"),
        "n_shared_experts": (2, shared_experts),
        "first_k_dense_replace": (0, dense_first),
        "moe_layer_freq": (1, dense_first),
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
    | gated_mlp("mlp.shared_experts.", "mlp.shared_experts."),
    aliases={"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"},
)
