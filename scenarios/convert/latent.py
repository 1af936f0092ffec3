"""Multi-head latent attention (DeepSeek): MLATransformerConfig's own fields."""

from scenarios.convert.family import HF, Fields, whole
from scenarios.convert.mapping import Copy, Mapped
from scenarios.convert.rope import (
    Unsaid,
    check_positive,
    note_single_mscale,
    note_whole_heads,
    one_spelling,
    only_known_parameters,
)
from scenarios.convert.weight_names import ATTENTION, HF_ATTENTION

LATENT_EPSILON = 1e-6
"""The source's norms of the latent vectors have this one, whatever rms_norm_eps says."""


def latent_attention(hf: HF, fields: Fields) -> None:
    """Ranks and sizes; every head has its own key and value."""
    heads = whole(hf, "num_attention_heads")
    if hf["num_key_value_heads"] not in (None, heads):
        raise ValueError(
            f"num_key_value_heads: got {hf['num_key_value_heads']}, expected none or {heads}: "
            "latent attention has no groups"
        )
    rotary = whole(hf, "qk_rope_head_dim")
    for name, size in {
        "head_dim": rotary,
        "qk_head_dim": rotary + whole(hf, "qk_nope_head_dim"),
    }.items():
        if hf.get(name) not in (None, size):
            raise ValueError(f"{name}: got {hf[name]!r}, expected none or {size}, which is derived")
    if hf["rms_norm_eps"] != LATENT_EPSILON:
        raise ValueError(
            f"rms_norm_eps: got {hf['rms_norm_eps']}, expected {LATENT_EPSILON}: the source norms "
            "latent vectors with that one always, and Megatron-LM has one for all norms"
        )
    if rotary % 2:
        raise ValueError(f"qk_rope_head_dim: got {rotary}, expected an even size")
    fields.transformer |= {
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": rotary + whole(hf, "qk_nope_head_dim"),
        "multi_latent_attention": True,
    }
    fields.mla |= {
        "q_lora_rank": None if hf["q_lora_rank"] is None else whole(hf, "q_lora_rank"),
        "kv_lora_rank": whole(hf, "kv_lora_rank"),
        "qk_head_dim": whole(hf, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": rotary,
        "v_head_dim": whole(hf, "v_head_dim"),
    }


def latent_rope(hf: HF, fields: Fields, *, unsaid: Unsaid) -> None:
    """Rotary positions of the latent part: none, or yarn, whose mscale also scales the softmax."""
    rope = one_spelling(hf, unsaid)
    if rope.pop("partial_rotary_factor") != 1:
        raise ValueError("partial_rotary_factor: expected 1, qk_rope_head_dim is what is rotated")
    note_whole_heads(hf, fields, unsaid)
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    check_positive("rope_theta", theta)
    fields.gpt_model["position_embedding_type"] = "rope"
    fields.mla |= {"rope_type": "rope", "rotary_base": float(theta)}
    only_known_parameters(kind, rope)
    if kind == "default":
        return
    if kind != "yarn":
        raise ValueError(f"rope type {kind!r}: expected default or yarn for latent attention")
    for name in ("factor", "original_max_position_embeddings"):
        check_positive(f"rope {name}", rope.get(name))
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if rope.get(name):
            check_positive(f"rope {name}", rope[name])
    if rope.get("truncate", True) is not True or "attention_factor" in rope:
        raise ValueError(
            "rope truncate and attention_factor: Megatron-LM's latent attention has neither; "
            f"got {rope}"
        )
    note_single_mscale(hf, fields, rope)
    mscale, all_dim = rope.get("mscale") or 0, rope.get("mscale_all_dim") or 0
    if all_dim and not mscale:
        raise ValueError(
            f"rope mscale_all_dim: got {all_dim} without mscale, by which the source scales the "
            "softmax only; Megatron-LM would also scale the rotation"
        )
    fields.mla |= {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope["factor"]),
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        # The source takes mscale only together with mscale_all_dim, and 1 otherwise.
        "mscale": float(mscale) if mscale and all_dim else 1.0,
        "mscale_all_dim": float(all_dim),
    }


_Q, _KV = f"{ATTENTION}linear_q_", f"{ATTENTION}linear_kv_"
LATENT_WEIGHTS: dict[str, Mapped] = {
    f"{_Q}proj.weight": Copy(f"{HF_ATTENTION}q_proj.weight"),
    f"{_Q}down_proj.weight": Copy(f"{HF_ATTENTION}q_a_proj.weight"),
    f"{ATTENTION}q_layernorm.weight": Copy(f"{HF_ATTENTION}q_a_layernorm.weight"),
    f"{_Q}up_proj.weight": Copy(f"{HF_ATTENTION}q_b_proj.weight"),
    f"{_KV}down_proj.weight": Copy(f"{HF_ATTENTION}kv_a_proj_with_mqa.weight"),
    f"{ATTENTION}kv_layernorm.weight": Copy(f"{HF_ATTENTION}kv_a_layernorm.weight"),
    f"{_KV}up_proj.weight": Copy(f"{HF_ATTENTION}kv_b_proj.weight"),
    f"{ATTENTION}linear_proj.weight": Copy(f"{HF_ATTENTION}o_proj.weight"),
}
