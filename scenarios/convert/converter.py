"""From a Hugging Face configuration to Megatron-LM's fields, by the table of its family."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scenarios.convert import qwen2
from scenarios.convert.family import Family, Fields, Only
from scenarios.convert.megatron import GPTModelArguments, MegatronModel, TransformerFields
from scenarios.flags import close_match

FAMILIES: dict[str, Family] = {family.model_type: family for family in (qwen2.FAMILY,)}


def convert(
    config: Any,
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    overrides: Mapping[str, Any] | None = None,
) -> MegatronModel:
    """Convert a model's configuration.

    Args:
        config: a mapping, the path of a config.json, or a transformers configuration object.
        tp: tensor parallel ranks.
        pp: pipeline stages.
        cp: context parallel ranks.
        overrides: fields of TransformerConfig or arguments of GPTModel to set instead.
    Returns:
        The model for that layout.
    Raises:
        ValueError: an unknown family, field or override, a contradiction, a feature Megatron-LM has
            no counterpart for, or a layout that does not divide the model.
    """
    hf = _as_mapping(config)
    model_type = hf.pop("model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(f"model_type: got {model_type!r}, expected one of {sorted(FAMILIES)}")
    family = FAMILIES[model_type]
    fields = Fields()
    _apply_rules(family, hf, fields)
    complete = {**family.defaults, **hf}
    for target, value in family.constants.items():
        _set(fields, target, value)
    _check_counts(family, complete)
    family.combine(complete, fields)
    fields.transformer |= {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
    }
    _override(fields, overrides or {})
    return MegatronModel.build(
        transformer=TransformerFields.build(**fields.transformer),
        gpt_model=GPTModelArguments.build(**fields.gpt_model),
        ignored=fields.ignored,
    )


def _apply_rules(family: Family, hf: Mapping[str, Any], fields: Fields) -> None:
    known = frozenset(family.rules) | frozenset(family.irrelevant)
    for name, value in hf.items():
        if name in family.irrelevant:
            fields.ignored[name] = family.irrelevant[name]
        elif name not in family.rules:
            raise ValueError(
                f"{family.model_type}: unknown field {name!r} = {value!r}{close_match(name, known)}"
            )
    for name, rule in family.rules.items():
        value = hf.get(name, family.defaults.get(name))
        if isinstance(rule, str):
            _set(fields, rule, value)
        elif isinstance(rule, Only) and name in hf and value not in rule.values:
            raise ValueError(
                f"{family.model_type}: {name}: got {value!r}, which asks for {rule.meaning}; "
                f"expected {' or '.join(map(repr, rule.values))}"
            )


def _check_counts(family: Family, hf: Mapping[str, Any]) -> None:
    """What is computed with before the fields are checked must be sane."""
    for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
        value = hf[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{family.model_type}: {name}: got {value!r}, expected 1 or more")
    for name, default in family.defaults.items():
        value = hf[name]
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"{family.model_type}: {name}: got {value!r}, expected true or false")
        whole = isinstance(default, int) and not isinstance(default, bool) and value is not None
        if whole and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"{family.model_type}: {name}: got {value!r}, expected an integer")


def _set(fields: Fields, target: str, value: Any) -> None:
    section, name = target.split(".")
    getattr(fields, section)[name] = value


def _override(fields: Fields, overrides: Mapping[str, Any]) -> None:
    sections = {
        **dict.fromkeys(TransformerFields.model_fields, fields.transformer),
        **dict.fromkeys(GPTModelArguments.model_fields, fields.gpt_model),
    }
    for name, value in overrides.items():
        if name not in sections:
            raise ValueError(f"override {name!r} is no Megatron field{close_match(name, sections)}")
        sections[name][name] = value


def _as_mapping(config: Any) -> dict[str, Any]:
    if isinstance(config, str | Path):
        path = Path(config)
        try:
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path}: not a config.json: {error}") from None
    elif isinstance(config, Mapping):
        content = dict(config)
    elif hasattr(config, "to_dict"):
        content = config.to_dict()
    else:
        content = config
    if not isinstance(content, dict):
        raise ValueError(f"config: got {type(content).__name__}, expected an object with fields")
    return dict(content)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is given twice")
    return content
