"""Rotary positions: the two ways Hugging Face writes them, and what Megatron-LM can do of them."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scenarios.convert.family import HF, Fields, Row, Together, whole

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


@dataclass(frozen=True)
class Unsaid:
    """What a family assumes where nothing is said."""

    theta: float = 10000.0
    partial: float = 1.0
    """Part of a head that is rotated."""
    rotates_parts: bool = False
    """Whether the family's model can rotate another part than all of a head."""
    scaling: Mapping[str, Any] | None = None
    """Type and parameters where there is neither rope_parameters nor rope_scaling."""


def rope(hf: HF, fields: Fields, *, unsaid: Unsaid) -> None:
    """Set the rotary fields.

    Args:
        hf: may hold ``rope_parameters`` (transformers 5), ``rope_scaling`` and ``rope_theta`` (4).
        fields: gets position_embedding_type, rotary_base, rotary_percent and those of the scaling.
        unsaid: what the family assumes.
    Raises:
        ValueError: the two ways contradict each other, or Megatron-LM has no such scaling.
    """
    given = one_spelling(hf, unsaid)
    kind, theta = given.pop("rope_type"), given.pop("rope_theta")
    percent = given.pop("partial_rotary_factor")
    only_known_parameters(kind, given)
    note_whole_heads(hf, fields, unsaid)
    _set_base(theta, fields)
    _set_percent(percent, kind, fields, unsaid)
    model = fields.gpt_model
    model["position_embedding_type"] = "rope"
    if kind in ("linear", "llama3"):
        check_positive("rope factor", given.get("factor"))
    if kind == "linear":
        model["seq_len_interpolation_factor"] = float(given["factor"])
    elif kind == "llama3":
        given.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
        for name, fixed in LLAMA3.items():
            if given.get(name) != fixed:
                raise ValueError(
                    f"rope {name}: got {given.get(name)}, Megatron-LM has {fixed} built in"
                )
        model |= {"rope_scaling": True, "rope_scaling_factor": float(given["factor"])}
    elif kind == "yarn":
        model["position_embedding_type"] = "yarn"
        note_single_mscale(hf, fields, given)
        fields.transformer |= _yarn(hf, given)


def default_base(hf: HF, *, unsaid: Unsaid) -> int:
    """The base of a rotation of whole heads without scaling, which is written as for ``rope``."""
    given = one_spelling(hf, unsaid)
    kind, theta = given.pop("rope_type"), given.pop("rope_theta")
    percent = given.pop("partial_rotary_factor")
    if (kind, percent) != ("default", 1) or given:
        raise ValueError(
            f"rope of layers with a window: got type {kind!r}, partial_rotary_factor {percent} and "
            f"{given}, expected type 'default' of whole heads without parameters"
        )
    return _base(theta)


def sectioned_rope(hf: HF, fields: Fields, *, unsaid: Unsaid) -> None:
    """Rotary positions of time, height and width (Qwen2.5-VL), each for its part of a head."""
    given = one_spelling(hf, unsaid)
    kind, theta = given.pop("rope_type"), given.pop("rope_theta")
    if kind not in ("default", "mrope"):
        raise ValueError(f"rope type {kind!r}: expected default or mrope, in sections")
    _set_percent(given.pop("partial_rotary_factor"), kind, fields, unsaid)
    sections = given.pop("mrope_section", None)
    only_known_parameters("default", given)
    half = fields.transformer["kv_channels"] / 2
    whole_numbers = isinstance(sections, list | tuple) and all(
        isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sections
    )
    if not whole_numbers or len(sections) != 3 or sum(sections) != half:
        raise ValueError(
            f"mrope_section: got {sections!r}, expected 3 sizes that sum to half a head, {half:g}"
        )
    note_whole_heads(hf, fields, unsaid)
    _set_base(theta, fields)
    fields.gpt_model["position_embedding_type"] = "mrope"
    fields.transformer["mrope_section"] = tuple(sections)


def rope_rows(unsaid: Unsaid, rule: Callable[..., None] = rope) -> dict[str, Row]:
    """The rows of a family with rotary positions, converted by ``rule``."""
    together: Together = functools.partial(rule, unsaid=unsaid)
    names = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
    return dict.fromkeys(names, (None, together))


def one_spelling(hf: HF, unsaid: Unsaid) -> dict[str, Any]:
    """Both spellings as one: rope_type, rope_theta, partial_rotary_factor and what else is given.

    Raises:
        ValueError: they contradict each other, or are no objects.
    """
    new, old = hf["rope_parameters"], hf["rope_scaling"]
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name}: got {value!r}, expected an object")
    new, old = _typed(new or {}), _typed(old or {})
    for name in sorted(new.keys() & old.keys()):
        if new[name] != old[name]:
            raise ValueError(
                f"rope_parameters and rope_scaling contradict each other: {name} {new[name]!r} "
                f"and {old[name]!r}"
            )
    given = old | new
    if not given and unsaid.scaling is not None:
        given = dict(unsaid.scaling)
    for name in ("rope_theta", "partial_rotary_factor"):
        value = hf[name]
        if value is not None:
            check_positive(name, value)
        if value is not None and given.setdefault(name, value) != value:
            raise ValueError(f"{name}: got {value} and {given[name]}, expected one value")
    given.setdefault("rope_theta", unsaid.theta)
    given.setdefault("partial_rotary_factor", unsaid.partial)
    given.setdefault("rope_type", "default")
    return given


def note_whole_heads(hf: HF, fields: Fields, unsaid: Unsaid) -> None:
    """A partial_rotary_factor that says what is so in any case changes nothing."""
    if hf["partial_rotary_factor"] == unsaid.partial:
        fields.ignored["partial_rotary_factor"] = "the part that the family rotates in any case"


def note_single_mscale(hf: HF, fields: Fields, given: Mapping[str, Any]) -> None:
    """The source reads mscale and mscale_all_dim only together."""
    if bool(given.get("mscale")) != bool(given.get("mscale_all_dim")):
        reason = "of mscale and mscale_all_dim only one is given: the source reads neither"
        names = [name for name in ("rope_parameters", "rope_scaling") if hf[name] is not None]
        fields.ignored |= dict.fromkeys(names, reason)


def only_known_parameters(kind: Any, given: Mapping[str, Any]) -> None:
    """Raises: ValueError: the type is unknown, or has no such parameter."""
    if kind not in PARAMETERS:
        raise ValueError(
            f"rope type {kind!r}: expected one of {[*PARAMETERS]}, which Megatron-LM can compute"
        )
    for name in given:
        if name not in PARAMETERS[kind]:
            raise ValueError(f"rope type {kind!r} has no parameter {name!r}: got {given[name]!r}")


def check_positive(name: str, value: Any) -> None:
    """Raises: ValueError: the value is no positive finite number."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < float("inf")
    ):
        raise ValueError(f"{name}: got {value!r}, expected a positive number")


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """``type`` is the older name of ``rope_type``; a parameter that is None is not given."""
    known = {name: value for name, value in given.items() if value is not None}
    kind = known.pop("type", None)
    if kind is None:
        return known
    # transformers writes mrope as type and default as rope_type: the sections are beside it.
    if known.setdefault("rope_type", kind) != kind and (kind, known["rope_type"]) != (
        "mrope",
        "default",
    ):
        raise ValueError(f"rope type: got {kind!r} and {known['rope_type']!r}, expected one")
    return known


def _set_base(theta: Any, fields: Fields) -> None:
    fields.gpt_model["rotary_base"] = _base(theta)


def _base(theta: Any) -> int:
    check_positive("rope_theta", theta)
    if float(theta) != int(theta):
        raise ValueError(f"rope_theta: got {theta}, expected a whole number, as Megatron-LM takes")
    return int(theta)


def _set_percent(percent: Any, kind: str, fields: Fields, unsaid: Unsaid) -> None:
    check_positive("partial_rotary_factor", percent)
    if percent != 1 and not unsaid.rotates_parts:
        raise ValueError(
            f"partial_rotary_factor: got {percent}, expected 1: the model rotates whole heads"
        )
    head_dim = fields.transformer["kv_channels"]
    rotated = int(head_dim * percent)
    if percent > 1 or not rotated or rotated % 2:
        raise ValueError(
            f"partial_rotary_factor: got {percent}, which rotates {rotated} of {head_dim} numbers "
            "of a head; expected an even number of them"
        )
    if percent != 1 and kind == "yarn":
        raise ValueError(
            f"partial_rotary_factor: got {percent}; Megatron-LM's yarn rotates whole heads"
        )
    fields.gpt_model["rotary_percent"] = float(percent)


def _yarn(hf: HF, given: Mapping[str, Any]) -> dict[str, Any]:
    longest = whole(hf, "max_position_embeddings")
    original = given.get("original_max_position_embeddings", longest)
    check_positive("rope original_max_position_embeddings", original)
    factor = given.get("factor", longest / original)
    check_positive("rope factor", factor)
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if given.get(name):
            check_positive(f"rope {name}", given[name])
    # Both mscales or none count, and 0 counts as none, as Hugging Face has it.
    mscale, all_dim = given.get("mscale") or None, given.get("mscale_all_dim") or None
    if mscale is None or all_dim is None:
        mscale = all_dim = None
    derived = yarn_concentration(factor, mscale, all_dim)
    concentration = given.get("attention_factor", derived)
    check_positive("rope attention_factor", concentration)
    if not math.isclose(concentration, derived, rel_tol=1e-12):
        raise ValueError(
            f"rope attention_factor: got {concentration}, expected none or {derived}: "
            "Megatron-LM derives it from the factor and mscale"
        )
    return {
        "yarn_rotary_scaling_factor": float(factor),
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": float(given.get("beta_fast") or 32),
        "yarn_beta_slow": float(given.get("beta_slow") or 1),
        "yarn_mscale": None if mscale is None else float(mscale),
        "yarn_mscale_all_dim": None if all_dim is None else float(all_dim),
        "yarn_correction_range_round_to_int": given.get("truncate", True),
    }


def yarn_concentration(factor: float, mscale: float | None, all_dim: float | None) -> float:
    """What yarn multiplies cos and sin with (https://arxiv.org/abs/2309.00071, section 3.4)."""
    if factor <= 1:
        return 1.0
    scale = 0.1 * math.log(factor)
    if mscale is None or all_dim is None:
        return scale + 1
    return (mscale * scale + 1) / (all_dim * scale + 1)
