"""From a Hugging Face configuration to Megatron-LM's fields, by the table of its family."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scenarios.convert.every_family import EVERY_ALIAS, EVERY_FAMILY
from scenarios.convert.families import family_of
from scenarios.convert.family import Family, Fields, Ignored, Only, Row
from scenarios.convert.layout import ParallelLayout
from scenarios.convert.megatron import (
    BertArguments,
    ExtraModules,
    GPTModelArguments,
    LatentFields,
    MegatronModel,
    TokenClassificationHead,
    TransformerFields,
)
from scenarios.flags import close_match


def convert(
    config: Any,
    *,
    layout: ParallelLayout | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> MegatronModel:
    """Convert a model's configuration.

    Args:
        config: a mapping, the path of a config.json, or a transformers configuration object.
        layout: how the model will be cut over ranks; none: not at all.
        overrides: fields of TransformerConfig, arguments of GPTModel or settings of the family's
            extra modules to set instead.
    Returns:
        The model for that layout.
    Raises:
        ValueError: an unknown family, field or override, a contradiction, a feature Megatron-LM has
            no counterpart for, or a layout that does not divide the model.
    """
    family, hf = read_config(config)
    table = rows_of(family)
    unknown = [name for name in hf if name not in table]
    if unknown:
        name = unknown[0]
        raise ValueError(
            f"{family.model_type}: unknown field {name!r} = {hf[name]!r}{close_match(name, table)}"
        )
    fields = Fields()
    for target, value in family.constants.items():
        fields.put(target, value)
    try:
        _apply(table, hf, fields)
    except ValueError as error:
        raise ValueError(f"{family.model_type}: {error}") from None
    fields.transformer |= (layout or ParallelLayout()).fields()
    _override(fields, overrides or {})
    return MegatronModel.build(
        model_type=family.model_type,
        transformer=TransformerFields.build(**fields.transformer),
        gpt_model=GPTModelArguments.build(**fields.gpt_model),
        mla=LatentFields.build(**fields.mla) if fields.mla else None,
        bert=BertArguments.build(**fields.bert) if fields.bert else None,
        extra=ExtraModules.build(**fields.extra) if fields.extra else None,
        head=TokenClassificationHead.build(**fields.head) if fields.head else None,
        ignored=fields.ignored,
    )


def read_config(config: Any) -> tuple[Family, dict[str, Any]]:
    """The table of a configuration, and its fields under the table's names.

    Raises:
        ValueError: it cannot be read, its family is not converted, or two spellings of a field
            contradict each other.
    """
    content = _as_mapping(config)
    family = family_of(content.pop("model_type", None))
    text = content.pop(family.text_part, None) if family.text_part else None
    if text is not None:
        content = _merged(content, _as_mapping(text), str(family.text_part))
    for alias, name in (EVERY_ALIAS | dict(family.aliases)).items():
        if alias not in content:
            continue
        value = content.pop(alias)
        if (
            value is not None
            and content.get(name) is not None
            and _plain(content[name]) != _plain(value)
        ):
            raise ValueError(
                f"{name} and {alias}, two spellings of one field, contradict each other: "
                f"got {content[name]!r} and {value!r}"
            )
        if content.get(name) is None:
            content[name] = value
    return family, content


def rows_of(family: Family) -> dict[str, Row]:
    """Every field that a configuration of the family may have."""
    return {**family.table, **{k: v for k, v in EVERY_FAMILY.items() if k not in family.table}}


def _apply(table: Mapping[str, Row], hf: Mapping[str, Any], fields: Fields) -> None:
    complete = {name: hf.get(name, default) for name, (default, _) in table.items()}
    for name, (default, _) in table.items():
        _check_kind(name, complete[name], default)
    done: list[Callable[..., None]] = []
    for name, (_, rule) in table.items():
        value = complete[name]
        if isinstance(rule, str):
            fields.put(rule, value)
        elif isinstance(rule, Ignored):
            if name in hf:
                fields.ignored[name] = rule.reason
        elif isinstance(rule, Only):
            if not any(type(value) is type(one) and value == one for one in rule.values):
                raise ValueError(
                    f"{name}: got {value!r}, which asks for {rule.meaning}; "
                    f"expected {' or '.join(map(repr, rule.values))}"
                )
            if value != table[name][0]:
                fields.ignored[name] = f"{value!r} means here what {table[name][0]!r} means"
        elif rule not in done:
            done.append(rule)
            rule(complete, fields)


def _check_kind(name: str, value: Any, default: Any) -> None:
    """A field has the type of its default; what has no default, its rule checks."""
    if isinstance(default, bool):
        right, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int) and value is not None:
        right = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        expected = "an integer"
    elif isinstance(default, float) and value is not None:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        expected = "a number"
    else:
        return
    if not right:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def _override(fields: Fields, overrides: Mapping[str, Any]) -> None:
    sections: dict[str, list[dict[str, Any]]] = {}
    for model, section in (
        (TransformerFields, fields.transformer),
        (GPTModelArguments, fields.gpt_model),
        *(((LatentFields, fields.mla),) if fields.mla else ()),
        *(((BertArguments, fields.bert),) if fields.bert else ()),
        *(((ExtraModules, fields.extra),) if fields.extra else ()),
    ):
        for name in model.model_fields:
            sections.setdefault(name, []).append(section)
    for name, value in overrides.items():
        if name not in sections:
            raise ValueError(f"override {name!r} is no Megatron field{close_match(name, sections)}")
        for section in sections[name]:
            section[name] = value


def _merged(whole: dict[str, Any], text: dict[str, Any], part: str) -> dict[str, Any]:
    """The text model's fields, and those of the larger model around it."""
    text.pop("model_type", None)
    tied = text.get("tie_word_embeddings")
    if tied or str(whole.get("transformers_version")).startswith("4."):
        # transformers 4 ties by the text model alone; 5 also where the larger model says so.
        whole = {name: v for name, v in whole.items() if name != "tie_word_embeddings"}
    for name in sorted(text.keys() & whole.keys() - {"architectures", "transformers_version"}):
        if _plain(text[name]) != _plain(whole[name]) and None not in (text[name], whole[name]):
            raise ValueError(
                f"{name}: got {whole[name]!r}, and {text[name]!r} in {part}; expected one value"
            )
    return whole | {name: v for name, v in text.items() if v is not None or name not in whole}


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if "dtype" in type(value).__name__ else value


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
