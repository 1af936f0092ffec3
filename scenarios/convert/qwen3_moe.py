"""Qwen3-MoE (transformers.Qwen3MoeConfig): Qwen3's attention, experts without a shared one."""

from scenarios.convert.attention import heads, no_attention_bias, switched_window
from scenarios.convert.experts import balance_loss, softmax_router, sparse_layers
from scenarios.convert.family import Family, Ignored, Only
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import DENSE_DECODER, EXPERTS, QUERY_KEY_NORMS

FAMILY = Family(
    model_type="qwen3_moe",
    table={
        "vocab_size": (151936, "gpt_model.vocab_size"),
        "hidden_size": (2048, "transformer.hidden_size"),
        "intermediate_size": (6144, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (24, "transformer.num_layers"),
        "num_attention_heads": (32, heads),
        "num_key_value_heads": (4, heads),
        "head_dim": (None, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (32768, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, no_attention_bias),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "use_sliding_window": (False, switched_window),
        "sliding_window": (4096, switched_window),
        "max_window_layers": (
            None,
            Ignored("the source's class has a window on all layers or none"),
        ),
        "num_experts": (128, softmax_router),
        "num_experts_per_tok": (8, softmax_router),
        "norm_topk_prob": (False, softmax_router),
        "moe_intermediate_size": (768, "transformer.moe_ffn_hidden_size"),
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
        "transformer.qk_layernorm": True,
        "transformer.hidden_dropout": 0.0,
    },
    weights=DENSE_DECODER | QUERY_KEY_NORMS | EXPERTS,
    aliases={"num_local_experts": "num_experts"},
)
