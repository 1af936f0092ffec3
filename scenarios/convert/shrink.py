"""A small model of the same structure: fewer and narrower layers, every mechanism kept."""

from typing import Any

from scenarios.convert.converter import read_config, rows_of

NUM_LAYERS = 4
LIMITS = {
    **dict.fromkeys(("vocab_size",), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), NUM_LAYERS),
    **dict.fromkeys(("intermediate_size", "n_inner"), 48),
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "n_positions": 64,
    "sliding_window": 7,
    "sliding_window_pattern": 3,
    "max_window_layers": 2,
    "decoder_sparse_step": NUM_LAYERS,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "n_shared_experts": 2,
    "num_nextn_predict_layers": 2,
    "swiglu_limit": 1.5,
    "full_attention_interval": NUM_LAYERS,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "attn_logit_softcapping": 2.0,
}
"""Field -> the largest value the small model has; smaller ones stay."""
MAX_HEADS, MAX_HIDDEN, MAX_EXPERTS = 8, 128, 16


def shrink(config: Any) -> dict[str, Any]:
    """The configuration of a small model with the same mechanisms.

    What the limits do not name stays: heads keep their size and so their rotation, groups keep
    more than one head if they have it, routers keep their groups.

    Args:
        config: as ``convert`` takes it.
    Returns:
        A configuration that says every field of the family's table, in fp32.
    Raises:
        ValueError: the configuration cannot be read.
    """
    family, given = read_config(config)
    hf: dict[str, Any] = {
        name: given.get(name, default) for name, (default, _) in rows_of(family).items()
    }
    hf |= {"model_type": family.model_type, "dtype": "float32", "pad_token_id": None}
    no_layer_has_a_window = (hf.get("max_window_layers") or 0) >= hf.get("num_hidden_layers", 0)
    _heads(hf)
    _delta_nets(hf)
    _experts(hf)
    for name, limit in LIMITS.items():
        value = hf.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > limit:
            hf[name] = limit
    if "max_window_layers" in hf and no_layer_has_a_window:
        hf["max_window_layers"] = hf["num_hidden_layers"]
    if hf.get("layer_types") is not None:
        # Derived anew from the fields above where the family does that.
        keep = "use_sliding_window" not in hf
        hf["layer_types"] = _layer_types(hf["layer_types"]) if keep else None
    if hf.get("mlp_only_layers"):
        hf["mlp_only_layers"] = _dense_layers(hf)
    said = {*given, "pad_token_id"}
    return {name: value for name, value in hf.items() if value is not None or name in said}


def _layer_types(types: list[str]) -> list[str]:
    """Those of the first layers; the last one stands for a kind that comes later only."""
    kept, missing = list(types[:NUM_LAYERS]), {*types[NUM_LAYERS:]} - {*types[:NUM_LAYERS]}
    return [*kept[:-1], missing.pop()] if missing else kept


def _dense_layers(hf: dict[str, Any]) -> list[int]:
    """The layers of mlp_only_layers that are still there; none, if no experts would be left."""
    step, layers = hf["decoder_sparse_step"], range(hf["num_hidden_layers"])
    dense = [layer for layer in hf["mlp_only_layers"] if layer in layers]
    return dense if any((i + 1) % step == 0 and i not in dense for i in layers) else []


def _heads(hf: dict[str, Any]) -> None:
    """Fewer heads; a head keeps its size where the family has a field for it."""
    hidden, heads = (
        ("n_embd", "n_head") if "n_embd" in hf else ("hidden_size", "num_attention_heads")
    )
    if hf[hidden] <= MAX_HIDDEN and hf[heads] <= MAX_HEADS:
        return
    head_dim = hf.get("head_dim") or hf[hidden] // hf[heads]
    groups = min(hf.get("num_key_value_heads") or hf[heads], 2)
    ratio = hf[heads] // (hf.get("num_key_value_heads") or hf[heads])
    hf[heads] = groups * min(ratio, MAX_HEADS // 2)
    if hf.get("num_key_value_heads"):
        hf["num_key_value_heads"] = hf[heads] if "kv_lora_rank" in hf else groups
    if "kv_lora_rank" in hf:
        hf[hidden] = 16 * hf[heads]
    elif "head_dim" in hf:
        hf |= {hidden: 16 * hf[heads], "head_dim": head_dim}
    else:
        hf[hidden] = hf[heads] * head_dim


def _delta_nets(hf: dict[str, Any]) -> None:
    """Fewer heads of linear attention; several values for a key stay several."""
    if "linear_num_key_heads" in hf:
        ratio = hf["linear_num_value_heads"] // hf["linear_num_key_heads"]
        hf["linear_num_key_heads"] = min(hf["linear_num_key_heads"], 2)
        hf["linear_num_value_heads"] = hf["linear_num_key_heads"] * min(ratio, MAX_HEADS // 2)


def _experts(hf: dict[str, Any]) -> None:
    """Fewer experts, in as many groups as the router's rule needs."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    name = next((name for name in names if name in hf), None)
    if name is None or hf[name] <= MAX_EXPERTS:
        return
    hf[name] = MAX_EXPERTS
    topk = hf["num_experts_per_tok"]
    if (hf.get("n_group") or 1) > 1:
        best = max(topk // hf["topk_group"], 1)
        hf |= {"n_group": 4, "topk_group": min(hf["topk_group"], 2)}
        hf["num_experts_per_tok"] = best * hf["topk_group"]
    else:
        hf["num_experts_per_tok"] = min(topk, 4)
