"""Qwen3-Next (transformers.Qwen3NextConfig): gated delta nets, gated attention, experts.

Three of four layers have linear attention, which is megatron-core's GatedDeltaNet. Norms multiply
by 1 + weight, but for the one inside the delta nets.
"""

from scenarios.convert.attention import FULL, heads, no_attention_bias
from scenarios.convert.experts import balance_loss, softmax_router, sparse_layers
from scenarios.convert.family import HF, Family, Fields, Only, whole
from scenarios.convert.mapping import Copy, DeltaNetInput, GatedQKV
from scenarios.convert.rope import Unsaid, rope_rows
from scenarios.convert.weight_names import (
    ATTENTION,
    DENSE_DECODER,
    EXPERTS,
    HF_ATTENTION,
    HF_LAYER,
    LAYER,
    QUERY_KEY_NORMS,
    gated_mlp,
)

LINEAR = "linear_attention"
DELTA_NET = (
    *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads"),
)
"""Sizes of a delta net; Megatron-LM has the same names."""


def delta_nets(hf: HF, fields: Fields) -> None:
    """Which layers have linear attention, and its sizes."""
    num_layers = whole(hf, "num_hidden_layers")
    types, interval = hf["layer_types"], hf["full_attention_interval"]
    every = 4 if interval is None else whole(hf, "full_attention_interval")
    derived = [LINEAR if (layer + 1) % every else FULL for layer in range(num_layers)]
    types = derived if types is None else types
    if (
        not isinstance(types, list | tuple)
        or len(types) != num_layers
        or {*types} - {LINEAR, FULL}
        or (interval is not None and [*types] != derived)
    ):
        says = "" if interval is None else f"; full_attention_interval {every} says {derived}"
        raise ValueError(
            f"layer_types: got {types!r}, expected {num_layers} of {LINEAR!r} and {FULL!r}{says}"
        )
    if LINEAR not in types:
        names = (*DELTA_NET, "full_attention_interval")
        fields.ignored |= dict.fromkeys(names, "no layer has linear attention")
        return
    if every > num_layers:
        fields.ignored["full_attention_interval"] = "no layer comes so late"
    sizes = {name: whole(hf, name) for name in DELTA_NET}
    if sizes["linear_num_value_heads"] % sizes["linear_num_key_heads"]:
        raise ValueError(
            f"linear_num_value_heads: got {sizes['linear_num_value_heads']}, expected a multiple "
            f"of linear_num_key_heads = {sizes['linear_num_key_heads']}"
        )
    fields.transformer |= sizes | {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": tuple(int(kind == LINEAR) for kind in types),
    }
    fields.extra["plain_delta_norm"] = True


FAMILY = Family(
    model_type="qwen3_next",
    table={
        "vocab_size": (151936, "gpt_model.vocab_size"),
        "hidden_size": (2048, "transformer.hidden_size"),
        "intermediate_size": (5632, "transformer.ffn_hidden_size"),
        "num_hidden_layers": (48, "transformer.num_layers"),
        "num_attention_heads": (16, heads),
        "num_key_value_heads": (2, heads),
        "head_dim": (256, heads),
        "hidden_act": ("silu", Only(("silu",), "another activation")),
        "max_position_embeddings": (32768, "gpt_model.max_sequence_length"),
        "initializer_range": (0.02, "transformer.init_method_std"),
        "rms_norm_eps": (1e-6, "transformer.layernorm_epsilon"),
        "tie_word_embeddings": (False, "gpt_model.share_embeddings_and_output_weights"),
        "attention_bias": (False, no_attention_bias),
        "attention_dropout": (0.0, "transformer.attention_dropout"),
        "use_sliding_window": (False, Only((False,), "a window, which the source's class has not")),
        "layer_types": (None, delta_nets),
        "full_attention_interval": (None, delta_nets),
        "linear_conv_kernel_dim": (4, delta_nets),
        "linear_key_head_dim": (128, delta_nets),
        "linear_value_head_dim": (128, delta_nets),
        "linear_num_key_heads": (16, delta_nets),
        "linear_num_value_heads": (32, delta_nets),
        "num_experts": (512, softmax_router),
        "num_experts_per_tok": (10, softmax_router),
        "norm_topk_prob": (True, softmax_router),
        "moe_intermediate_size": (512, "transformer.moe_ffn_hidden_size"),
        "shared_expert_intermediate_size": (
            *(512, "transformer.moe_shared_expert_intermediate_size"),
        ),
        "decoder_sparse_step": (1, sparse_layers),
        "mlp_only_layers": (None, sparse_layers),
        "output_router_logits": (False, balance_loss),
        "router_aux_loss_coef": (0.001, balance_loss),
        **rope_rows(Unsaid(partial=0.25, rotates_parts=True)),
    },
    constants={
        "transformer.normalization": "RMSNorm",
        "transformer.layernorm_zero_centered_gamma": True,
        "transformer.activation_func": "silu",
        "transformer.gated_linear_unit": True,
        "transformer.qk_layernorm": True,
        "transformer.attention_output_gate": True,
        "transformer.moe_shared_expert_gate": True,
        "transformer.hidden_dropout": 0.0,
    },
    weights=DENSE_DECODER
    | QUERY_KEY_NORMS
    | EXPERTS
    | gated_mlp("mlp.shared_experts.", "mlp.shared_expert.")
    | {
        f"{LAYER}mlp.shared_experts.gate_weight": Copy(f"{HF_LAYER}mlp.shared_expert_gate.weight"),
        f"{ATTENTION}linear_qkv.weight": GatedQKV(
            (
                f"{HF_ATTENTION}q_proj.weight",
                f"{HF_ATTENTION}k_proj.weight",
                f"{HF_ATTENTION}v_proj.weight",
            )
        ),
        f"{ATTENTION}in_proj.weight": DeltaNetInput(
            (
                f"{HF_LAYER}linear_attn.in_proj_qkvz.weight",
                f"{HF_LAYER}linear_attn.in_proj_ba.weight",
            )
        ),
        f"{ATTENTION}conv1d.weight": Copy(f"{HF_LAYER}linear_attn.conv1d.weight"),
        f"{ATTENTION}dt_bias": Copy(f"{HF_LAYER}linear_attn.dt_bias"),
        f"{ATTENTION}A_log": Copy(f"{HF_LAYER}linear_attn.A_log"),
        f"{ATTENTION}out_norm.weight": Copy(f"{HF_LAYER}linear_attn.norm.weight"),
        f"{ATTENTION}out_proj.weight": Copy(f"{HF_LAYER}linear_attn.out_proj.weight"),
    },
    other_tensors=("mtp.",),
    aliases={"num_local_experts": "num_experts"},
)
