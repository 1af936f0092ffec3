"""Mixtral 8x7B and 8x22B (transformers.MixtralConfig): experts in every layer."""

from scenarios.convert.attention import heads, one_window
from scenarios.convert.experts import balance_loss, top_logits_router
from scenarios.convert.family import HF, Family, Fields, Only, whole
from scenarios.convert.mapping import Copy, Stacked
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import HEAD, HF_LAYER, LAYER, NORMS, attention

_EXPERT, _HF_EXPERT = (
    f"{LAYER}mlp.experts.local_experts.{{expert}}.",
    f"{HF_LAYER}block_sparse_moe.experts.{{expert}}.",
)


def every_mlp_is_an_expert(hf: HF, fields: Fields) -> None:
    """intermediate_size is that of an expert."""
    size = whole(hf, "intermediate_size")
    fields.transformer |= {"ffn_hidden_size": size, "moe_ffn_hidden_size": size}


FAMILY = Family(
    model_type="mixtral",
    table={
        "vocab_size": (32000, "gpt_model.vocab_size"),
        "hidden_size": (4096, "transformer.hidden_size"),
        "intermediate_size": (14336, every_mlp_is_an_expert),
        "num_hidden_layers": (32, "transformer.num_layers"),
        "num_attention_heads": (32, heads),
        "num_key_value_heads": (8, heads),
        "head_dim": (None, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (131072, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-5, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "sliding_window": (None, one_window),
        "num_local_experts": (8, top_logits_router),
        "num_experts_per_tok": (2, top_logits_router),
        "router_jitter_noise": (
            *(0.0, Only((0, 0.0), "noise on the experts' inputs too, not the router's alone")),
        ),
        "output_router_logits": (False, balance_loss),
        "router_aux_loss_coef": (0.001, balance_loss),
        **rope_rows(Unsaid(theta=1000000.0)),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.add_bias_linear": False,
        "transformer.hidden_dropout": 0.0,
    },
    weights=HEAD
    | NORMS
    | attention()
    | {
        f"{LAYER}mlp.router.weight": Copy(f"{HF_LAYER}block_sparse_moe.gate.weight"),
        f"{_EXPERT}linear_fc1.weight": Stacked(
            (f"{_HF_EXPERT}w1.weight", f"{_HF_EXPERT}w3.weight")
        ),
        f"{_EXPERT}linear_fc2.weight": Copy(f"{_HF_EXPERT}w2.weight"),
    },
    aliases={"num_experts": "num_local_experts"},
)
