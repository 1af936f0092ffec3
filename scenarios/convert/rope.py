"""Rotary positions: the two ways Hugging Face writes them, and what Megatron-LM can do of them."""

from collections.abc import Mapping
from typing import Any

from scenarios.convert.family import Fields

PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"),
        *("mscale_all_dim", "attention_factor", "truncate"),
    ),
}
"""Type -> its parameters; longrope and dynamic have no counterpart in Megatron-LM."""
LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Fixed in Megatron-LM's RotaryEmbedding._apply_scaling."""


def convert_rope(hf: Mapping[str, Any], fields: Fields) -> None:
    """Set the rotary fields.

    Args:
        hf: may hold ``rope_parameters`` (transformers 5), ``rope_scaling`` and ``rope_theta`` (4).
        fields: gets position_embedding_type, rotary_base, rotary_percent and those of the scaling.
    Raises:
        ValueError: the two ways contradict each other, or Megatron-LM has no such scaling.
    """
    rope = _one_spelling(hf)
    kind = rope.pop("rope_type")
    theta = rope.pop("rope_theta")
    if kind not in PARAMETERS:
        raise ValueError(
            f"rope type {kind!r}: expected one of {[*PARAMETERS]}, which Megatron-LM can compute"
        )
    for name in rope:
        if name not in PARAMETERS[kind]:
            raise ValueError(f"rope type {kind!r} has no parameter {name!r}: got {rope[name]!r}")
    _check_positive("rope_theta", theta)
    if float(theta) != int(theta):
        raise ValueError(f"rope_theta: got {theta}, expected a whole number, as Megatron-LM takes")
    model = fields.gpt_model
    model |= {"position_embedding_type": "rope", "rotary_base": int(theta), "rotary_percent": 1.0}
    if kind in ("linear", "llama3"):
        _check_positive("rope factor", rope.get("factor"))
    if kind == "linear":
        model["seq_len_interpolation_factor"] = float(rope["factor"])
    elif kind == "llama3":
        rope.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
        for name, fixed in LLAMA3.items():
            if rope.get(name) != fixed:
                raise ValueError(
                    f"rope {name}: got {rope.get(name)}, Megatron-LM has {fixed} built in"
                )
        model |= {"rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}
    elif kind == "yarn":
        model["position_embedding_type"] = "yarn"
        fields.transformer |= _yarn(hf, rope)


def _one_spelling(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings as one dictionary with rope_type and rope_theta."""
    new, old = hf.get("rope_parameters"), hf.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}: got {value!r}, expected an object")
    new, old = _typed(new or {}), _typed(old or {})
    for name in new.keys() & old.keys():
        if new[name] != old[name]:
            raise ValueError(
                f"rope_parameters and rope_scaling contradict each other: {name} {new[name]!r} "
                f"and {old[name]!r}"
            )
    rope = old | new
    theta = hf.get("rope_theta")
    if theta is not None and rope.setdefault("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta: got {theta} and {rope['rope_theta']}, expected one value")
    rope.setdefault("rope_theta", 10000.0)
    rope.setdefault("rope_type", "default")
    partial = hf.get("partial_rotary_factor"), rope.pop("partial_rotary_factor", None)
    if any(part not in (None, 1, 1.0) for part in partial):
        raise ValueError(f"partial_rotary_factor: got {partial}, expected 1, the model rotates all")
    return rope


def _typed(rope: Mapping[str, Any]) -> dict[str, Any]:
    """``type`` is the older name of ``rope_type``; a parameter that is None is not given."""
    given = {name: value for name, value in rope.items() if value is not None}
    kind = given.pop("type", None)
    if kind is not None and given.setdefault("rope_type", kind) != kind:
        raise ValueError(f"rope type: got {kind!r} and {given['rope_type']!r}, expected one")
    return given


def _yarn(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    original = rope.get("original_max_position_embeddings", hf["max_position_embeddings"])
    _check_positive("rope original_max_position_embeddings", original)
    factor = rope.get("factor", hf["max_position_embeddings"] / original)
    _check_positive("rope factor", factor)
    if "attention_factor" in rope:
        raise ValueError(
            f"rope attention_factor: got {rope['attention_factor']}, expected none: "
            "Megatron-LM derives it from the factor and mscale"
        )
    # Both mscales or none count, and 0 counts as none, as Hugging Face has it.
    both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
    return {
        "yarn_rotary_scaling_factor": float(factor),
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_mscale": float(rope["mscale"]) if both else None,
        "yarn_mscale_all_dim": float(rope["mscale_all_dim"]) if both else None,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }


def _check_positive(name: str, value: Any) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise ValueError(f"{name}: got {value!r}, expected a positive number")
