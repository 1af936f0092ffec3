"""Every family's table: complete, true to the source's class, and nothing is lost."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from scenarios.convert import MegatronModel, convert
from scenarios.convert.converter import read_config, rows_of
from scenarios.convert.families import FAMILIES
from tests.convert_cases import DEEPSEEK_YARN, DEFAULT, PUBLISHED, default, published
from tests.convert_odd import odd

Config = dict[str, Any]

Config = dict[str, Any]


TEXT_MODELS = {"qwen2_5_vl": "qwen2_5_vl_text", "gemma3": "gemma3_text"}
AROUND_TEXT = ("architectures", "vision", "image", "boi", "eoi", "mm_", "model_type")


def as_object(config: Config) -> Any:
    """The configuration as transformers holds it."""
    fields = json.loads(json.dumps(config))
    model_type = fields.pop("model_type")
    if model_type in TEXT_MODELS:
        model_type = TEXT_MODELS[model_type]
        fields |= fields.pop("text_config", {})
        for name in [n for n in fields if n.startswith(AROUND_TEXT)]:
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
    assert from_file.bert == from_object.bert
    assert from_file.extra == from_object.extra
    assert from_object == convert(as_object(config).to_dict())


# What PretrainedConfig.to_dict() of transformers 4.57.1 writes for every model.
OF_TRANSFORMERS_4: Config = {
    **dict.fromkeys(("torchscript", "tf_legacy_loss", "use_bfloat16", "is_decoder"), False),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), False),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "output_scores"), False),
    **dict.fromkeys(("finetuning_task", "task_specific_params", "problem_type", "prefix"), None),
    **dict.fromkeys(("tokenizer_class", "sep_token_id", "cross_attention_hidden_size"), None),
    **dict.fromkeys(("decoder_start_token_id", "architectures", "dtype"), None),
    "return_dict": True,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "_name_or_path": "",
    "transformers_version": "4.57.1",
}


@pytest.mark.parametrize("model_type", DEFAULT)
def test_what_transformers_4_writes_changes_nothing(model_type: str) -> None:
    model, same = convert(published(model_type)), convert(OF_TRANSFORMERS_4 | published(model_type))
    assert without_reasons(model) == without_reasons(same)


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


def without_reasons(model: MegatronModel) -> MegatronModel:
    """The model without what it says about fields of no effect."""
    return model.model_copy(update={"ignored": {}})


def effect(
    config: Config, name: str, value: Any, translate: Callable[..., MegatronModel] = convert
) -> str:
    """What a changed field does: "changed", "ignored", "refused"; "lost", "unclear" are bugs."""
    before = translate(config)
    try:
        after = translate({**config, name: value})
    except ValueError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) > 15 else "unclear"
    if without_reasons(after) != without_reasons(before):
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
    return [
        (name, new)
        for (name, _), new in cases.items()
        if effect(complete, name, new, translate) in ("lost", "unclear")
    ]


@pytest.mark.parametrize("kind", [default, published])
@pytest.mark.parametrize("model_type", DEFAULT)
def test_no_field_is_lost(model_type: str, kind: Callable[[str], Config]) -> None:
    config = kind(model_type)
    assert lost(config) == []
    assert lost(as_object(config).to_dict()) == []


@settings(max_examples=25, derandomize=True)
@given(st.sampled_from(sorted(DEFAULT)).flatmap(odd))
def test_no_field_of_an_odd_model_is_lost(config: Config) -> None:
    assert lost(config) == []


@pytest.mark.parametrize("model_type", ["qwen2", "deepseek_v3"])
def test_no_field_is_lost_where_one_mscale_says_nothing(model_type: str) -> None:
    yarn = DEEPSEEK_YARN | {"mscale": 0.7}
    assert lost(published(model_type) | {"rope_theta": 10000.0, "rope_scaling": yarn}) == []


def test_the_search_finds_a_converter_that_loses_fields() -> None:
    def careless(config: Config) -> MegatronModel:
        kept = {name: item for name, item in config.items() if name != "rope_scaling"}
        return convert(kept)

    names = {name for name, _ in lost(published("llama"), careless)}
    assert names == {"rope_scaling"}


def test_token_classification() -> None:
    config = published("qwen2") | {
        "architectures": ["Qwen2ForTokenClassification"],
        "id2label": {"0": "O", "1": "B", "2": "I"},
        "tie_word_embeddings": True,
    }
    model = convert(config)
    assert model.head is not None
    assert (model.head.num_labels, model.head.dropout) == (3, 0.1)
    assert not model.gpt_model.share_embeddings_and_output_weights
    assert "tie_word_embeddings" in model.ignored
    assert lost(config) == []
    for change in ({"num_labels": 4}, {"label2id": {"O": 0}}):
        with pytest.raises(ValueError, match="expected one number"):
            convert(config | change)


def test_heads_of_bert() -> None:
    """Each class has its own; what is not there is no part of the output."""
    labels = {"0": "O", "1": "B", "2": "I"}
    config = {"hidden_dropout_prob": 0.2, "id2label": labels}
    heads = {}
    for name in ("ForPreTraining", "ForMaskedLM", "Model", "ForTokenClassification"):
        changed = published("bert") | config | {"architectures": [f"Bert{name}"]}
        model = convert(changed)
        assert model.bert is not None
        heads[name] = (model.bert.lm_head, model.bert.pooler, model.bert.binary_head)
        assert model.gpt_model.share_embeddings_and_output_weights == model.bert.lm_head
        assert (model.head is not None) == (name == "ForTokenClassification")
        assert lost(changed) == []
    assert heads == {
        "ForPreTraining": (True, True, True),
        "ForMaskedLM": (True, False, False),
        "Model": (False, True, False),
        "ForTokenClassification": (False, False, False),
    }
    assert model.head is not None
    assert (model.head.num_labels, model.head.dropout) == (3, 0.2)


def test_every_family_has_its_cases() -> None:
    assert set(DEFAULT) == set(PUBLISHED) == set(FAMILIES) - {"qwen2_5_vl_text"}
