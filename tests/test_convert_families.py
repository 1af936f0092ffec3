"""Every family's table: complete, true to the source's class, and nothing is lost."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from primitives import env
from scenarios.convert import MegatronModel, ParallelLayout, convert
from scenarios.convert.converter import read_config, rows_of
from scenarios.convert.families import FAMILIES, REFUSED
from scenarios.convert.flags import flags, plain, to_yaml, words
from tests.convert_cases import DEEPSEEK_YARN, DEFAULT, LLAMA3, PUBLISHED, default, odd, published

Config = dict[str, Any]
CASES = int(env.CONVERT_CASES.get())
NO_MODEL_NUMBER = {"transformers_version", "_name_or_path"}


def as_object(config: Config) -> Any:
    """The configuration as transformers holds it."""
    fields = json.loads(json.dumps(config))
    model_type = fields.pop("model_type")
    if model_type == "qwen2_5_vl":
        model_type = "qwen2_5_vl_text"
        for name in [n for n in fields if n.startswith("vision") or n == "architectures"]:
            del fields[name]
    return AutoConfig.for_model(model_type, **fields)


@pytest.mark.parametrize("kind", [default, published])
@pytest.mark.parametrize("model_type", DEFAULT)
def test_file_and_object_are_one_model(model_type: str, kind: Callable[[str], Config]) -> None:
    """What transformers 5 makes of a file of transformers 4 converts to the same model."""
    config = kind(model_type)
    from_file, from_object = convert(config), convert(as_object(config))
    assert from_file.transformer == from_object.transformer
    assert from_file.gpt_model == from_object.gpt_model
    assert from_file.mla == from_object.mla
    assert from_object == convert(as_object(config).to_dict())


@pytest.mark.parametrize("model_type", DEFAULT)
def test_the_table_knows_every_field_of_the_source(model_type: str) -> None:
    source = as_object(default(model_type)).to_dict()
    family, fields = read_config(source)
    assert set(fields) <= set(rows_of(family))
    for name, (assumed, _) in family.table.items():
        if name in source and assumed is not None and name not in DEFAULT[model_type]:
            derived = {"layer_types", "rope_parameters", "sliding_window", "mlp_only_layers"}
            assert name in derived or source[name] == assumed, name


def changes(value: Any) -> list[Any]:
    """Other values of the same kind, small steps and large ones."""
    if value is None:
        return [1, 0.5, True, "x"]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value + 2, -1]
    if isinstance(value, float):
        return [value + 1, value + 0.25, value * 0.5 + 1e-3]
    if isinstance(value, str):
        return [value + "x"]
    if isinstance(value, Mapping):
        return [{**value, name: new} for name, item in value.items() for new in changes(item)] + [
            {**value, "unknown": 1}
        ]
    return [value[:-1], [*value, "x"]]


def effect(
    config: Config, name: str, value: Any, translate: Callable[..., MegatronModel] = convert
) -> str:
    """What one changed field does: "changed", "ignored", "refused", or "lost", which is the bug."""
    before = translate(config)
    try:
        after = translate({**config, name: value})
    except ValueError as error:
        assert "\n" not in str(error)
        assert len(str(error)) > 15
        return "refused"
    if after.model_copy(update={"ignored": {}}) != before.model_copy(update={"ignored": {}}):
        return "changed"
    return "ignored" if name in after.ignored or name in before.ignored else "lost"


def lost(
    config: Config, translate: Callable[..., MegatronModel] = convert
) -> list[tuple[str, Any]]:
    """Every field of the configuration and of its family's table, changed: those of no effect."""
    family, given_fields = read_config(config)
    rows = rows_of(family)
    complete = {"model_type": family.model_type} | given_fields
    cases = {
        (name, json.dumps(new)): new
        for name, (assumed, rule) in rows.items()
        for new in changes(given_fields.get(name, assumed))
        if new != given_fields.get(name, assumed)
    }
    equal = {
        # Two spellings of the value that counts.
        ("architectures", 1): "",
    }
    assert equal
    return [
        (name, new)
        for (name, _), new in cases.items()
        if effect(complete, name, new, translate) == "lost"
    ]


@pytest.mark.parametrize("kind", [default, published])
@pytest.mark.parametrize("model_type", DEFAULT)
def test_no_field_is_lost(model_type: str, kind: Callable[[str], Config]) -> None:
    config = kind(model_type)
    assert lost(config) == []
    assert lost(as_object(config).to_dict()) == []
