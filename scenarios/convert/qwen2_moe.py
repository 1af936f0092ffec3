"""Qwen1.5-MoE and Qwen2-57B-A14B (transformers.Qwen2MoeConfig): experts, a shared one gated."""

from scenarios.convert.attention import heads, window_on_even_layers
from scenarios.convert.experts import balance_loss, softmax_router, sparse_layers
from scenarios.convert.family import Family, Only
from scenarios.convert.mapping import Copy
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import (
    DENSE_DECODER,
    EXPERTS,
    HF_LAYER,
    LAYER,
    attention,
    gated_mlp,
)

FAMILY = Family(
    model_type="qwen2_moe",
    table={
        "vocab_size": (151936, "gpt_model.vocab_size"),
        "hidden_size": (2048, "transformer.hidden_size"),
        "intermediate_size": (5632, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (24, "transformer.num_layers"),
        "num_attention_heads": (16, heads),
        "num_key_value_heads": (16, heads),
        "head_dim": (None, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (32768, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "qkv_bias": (True, "transformer.add_qkv_bias"),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "use_sliding_window": (False, window_on_even_layers),
        "sliding_window": (4096, window_on_even_layers),
        "max_window_layers": (28, window_on_even_layers),
        "layer_types": (None, window_on_even_layers),
        "num_experts": (60, softmax_router),
        "num_experts_per_tok": (4, softmax_router),
        "norm_topk_prob": (False, softmax_router),
        "moe_intermediate_size": (1408, "transformer.moe_ffn_hidden_size"),
        "shared_expert_intermediate_size": (
            *(5632, "transformer.moe_shared_expert_intermediate_size"),
        ),
        "decoder_sparse_step": (1, sparse_layers),
        "mlp_only_layers": (None, sparse_layers),
        "output_router_logits": (False, balance_loss),
        "router_aux_loss_coef": (0.001, balance_loss),
        **rope_rows(Unsaid()),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.add_bias_linear": False,
        "transformer.moe_shared_expert_gate": True,
        "transformer.hidden_dropout": 0.0,
    },
    weights=DENSE_DECODER
    | attention("bias")
    | EXPERTS
    | gated_mlp("mlp.shared_experts.", "mlp.shared_expert.")
    | {f"{LAYER}mlp.shared_experts.gate_weight": Copy(f"{HF_LAYER}mlp.shared_expert_gate.weight")},
    aliases={"num_local_experts": "num_experts"},
)
