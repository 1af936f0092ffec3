"""gpt-oss (transformers.GptOssConfig): sinks, windows in turn, biased and clamped experts."""

from scenarios.convert.attention import heads, windows_in_turn
from scenarios.convert.experts import balance_loss, top_logits_router
from scenarios.convert.family import HF, Family, Fields, Only, number
from scenarios.convert.mapping import Copy, OfExperts
from scenarios.convert.mixtral import every_mlp_is_an_expert
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import (
    ATTENTION,
    HEAD,
    HF_ATTENTION,
    HF_LAYER,
    LAYER,
    NORMS,
    attention,
)

_EXPERT, _HF_EXPERTS = f"{LAYER}mlp.experts.local_experts.{{expert}}.", f"{HF_LAYER}mlp.experts."
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def clamp(hf: HF, fields: Fields) -> None:
    """Gates are clamped to swiglu_limit from above, linear parts from both sides."""
    limit = number(hf, "swiglu_limit")
    if limit <= 0:
        raise ValueError(f"swiglu_limit: got {limit}, expected a positive number")
    fields.transformer["activation_func_clamp_value"] = limit


FAMILY = Family(
    model_type="gpt_oss",
    table={
        "vocab_size": (201088, "gpt_model.vocab_size"),
        "hidden_size": (2880, "transformer.hidden_size"),
        "intermediate_size": (2880, every_mlp_is_an_expert),
        "num_hidden_layers": (36, "transformer.num_layers"),
        "num_attention_heads": (64, heads),
        "num_key_value_heads": (8, heads),
        "head_dim": (64, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "swiglu_alpha": (1.702, Only((1.702,), "another slope than quick_gelu's, 1.702")),
        "swiglu_limit": (7.0, clamp),
        "max_position_embeddings": (131072, "gpt_model.max_sequence_length"),
        "initial_context_length": (None, Only((None, 4096), "another length than yarn's")),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-5, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (True, Only((True,), "experts with biases and attention without")),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "sliding_window": (128, windows_in_turn),
        "layer_types": (None, windows_in_turn),
        "num_local_experts": (128, top_logits_router),
        "num_experts_per_tok": (4, top_logits_router),
        "output_router_logits": (False, balance_loss),
        "router_aux_loss_coef": (0.001, balance_loss),
        **rope_rows(Unsaid(theta=150000.0, scaling=YARN)),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.activation_func": "quick_gelu",
        "transformer.gated_linear_unit": True,
        "transformer.glu_linear_offset": 1.0,
        "transformer.add_bias_linear": True,
        "transformer.add_qkv_bias": True,
        "transformer.softmax_type": "learnable",
        "transformer.hidden_dropout": 0.0,
    },
    weights=HEAD
    | NORMS
    | attention()
    | attention("bias")
    | {
        f"{ATTENTION}core_attention.softmax_offset": Copy(f"{HF_ATTENTION}sinks"),
        f"{LAYER}mlp.router.weight": Copy(f"{HF_LAYER}mlp.router.weight"),
        f"{LAYER}mlp.router.bias": Copy(f"{HF_LAYER}mlp.router.bias"),
        f"{_EXPERT}linear_fc1.weight": OfExperts(f"{_HF_EXPERTS}gate_up_proj", True),
        f"{_EXPERT}linear_fc1.bias": OfExperts(f"{_HF_EXPERTS}gate_up_proj_bias", True),
        f"{_EXPERT}linear_fc2.weight": OfExperts(f"{_HF_EXPERTS}down_proj"),
        f"{_EXPERT}linear_fc2.bias": OfExperts(f"{_HF_EXPERTS}down_proj_bias"),
    },
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
)
