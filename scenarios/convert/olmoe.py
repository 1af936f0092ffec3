"""OLMoE (transformers.OlmoeConfig): experts in every layer, one norm over all heads."""

from scenarios.convert.attention import heads, no_attention_bias
from scenarios.convert.experts import balance_loss, softmax_router
from scenarios.convert.family import Family, Only
from scenarios.convert.mixtral import every_mlp_is_an_expert
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import EXPERTS, HEAD, NORMS, QUERY_KEY_NORMS, attention

FAMILY = Family(
    model_type="olmoe",
    table={
        "vocab_size": (50304, "gpt_model.vocab_size"),
        "hidden_size": (2048, "transformer.hidden_size"),
        "intermediate_size": (2048, every_mlp_is_an_expert),
        "num_hidden_layers": (16, "transformer.num_layers"),
        "num_attention_heads": (16, heads),
        "num_key_value_heads": (None, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (4096, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-5, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, no_attention_bias),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "clip_qkv": (None, Only((None,), "clipped queries, keys and values")),
        "num_experts": (64, softmax_router),
        "num_experts_per_tok": (8, softmax_router),
        "norm_topk_prob": (False, softmax_router),
        "output_router_logits": (False, balance_loss),
        "router_aux_loss_coef": (0.01, balance_loss),
        **rope_rows(Unsaid()),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.hidden_dropout": 0.0,
        "extra.all_heads_qk_norm": True,
    },
    weights=HEAD | NORMS | attention() | QUERY_KEY_NORMS | EXPERTS,
    aliases={"num_local_experts": "num_experts"},
)
