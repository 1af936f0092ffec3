"""Hugging Face to Megatron-LM configurations on TP2 x PP2: every rank converts, and all agree.

A result that depended on the rank or on hash order would build parts that do not fit together. So
each rank converts for the layout and cuts out its own part; the parts must add up to the whole
model. The search for lost fields, one conversion for each changed field, is shared out over the
ranks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch.distributed as dist
from transformers import Qwen2Config

from scenarios.convert import MegatronModel, ParallelLayout, convert

pytestmark = pytest.mark.usefixtures("world")

TP, PP = 2, 2
LAYOUT = ParallelLayout(tp=TP, pp=PP)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
PERTURBED = {
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": 512,
    "max_window_layers": 20,
    "dtype": "bfloat16",
    "rope_parameters": YARN | {"rope_theta": 1000000.0},
}
CONFIGS = {"default": {}, "perturbed": PERTURBED}


def gathered(item: object) -> list[Any]:
    """The item of every rank, in rank order."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def own_part(model: MegatronModel, rank: int) -> dict[str, tuple[int, set[int]]]:
    """What one rank builds: name -> (size of the whole, this rank's indices of it)."""
    tp_rank, pp_rank = rank % TP, rank // TP
    fields = model.transformer

    def cut(numel: int, index: int, degree: int) -> tuple[int, set[int]]:
        return numel, set(range(index * numel // degree, (index + 1) * numel // degree))

    return {
        "layers": cut(fields.num_layers, pp_rank, PP),
        "heads": cut(fields.num_attention_heads, tp_rank, TP),
        "query_groups": cut(fields.num_query_groups, tp_rank, TP),
        "ffn": cut(fields.ffn_hidden_size, tp_rank, TP),
        "vocabulary": cut(model.gpt_model.vocab_size, tp_rank, TP),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_agree_and_their_parts_make_the_model(name: str) -> None:
    assert dist.get_world_size() == TP * PP
    model = convert(Qwen2Config(**CONFIGS[name]), layout=LAYOUT)
    models = gathered(model.model_dump_json())
    assert models == [models[0]] * len(models)
    parts = gathered(own_part(model, dist.get_rank()))
    for key, (numel, _) in parts[0].items():
        pieces = [part[key][1] for part in parts]
        assert set.union(*pieces) == set(range(numel)), key
        assert len({len(piece) for piece in pieces}) == 1, f"{key}: equal parts"


def test_the_perturbed_model_is_what_the_table_says() -> None:
    model = convert(Qwen2Config(**PERTURBED), layout=LAYOUT)
    fields = model.transformer
    assert (fields.num_layers, fields.num_query_groups, fields.kv_channels) == (24, 4, 64)
    assert fields.window_size == (511, 0)
    assert fields.window_attn_skip_freq == (0,) * 20 + (1,) * 4
    assert fields.yarn_rotary_scaling_factor == 4.0
    assert fields.yarn_original_max_position_embeddings == 8192
    assert (fields.bf16, fields.fp16) == (True, False)
    assert model.gpt_model.position_embedding_type == "yarn"
    assert model.gpt_model.rotary_base == 1000000
    assert model.gpt_model.share_embeddings_and_output_weights


def test_every_rank_refuses_a_layout_that_does_not_divide() -> None:
    with pytest.raises(
        ValueError, match="num_query_groups: got 1, expected a multiple of 2"
    ) as caught:
        convert(Qwen2Config(num_key_value_heads=1), layout=LAYOUT)
    messages = gathered(str(caught.value))
    assert messages == [messages[0]] * len(messages)


def changes(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if value is None:
        return [1]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value + 2]
    if isinstance(value, float):
        return [value + 1, value + 0.25]
    if isinstance(value, str):
        return [value + "x"]
    if isinstance(value, Mapping):
        return [{**value, name: new} for name, item in value.items() for new in changes(item)]
    return [value[:-1], [*value, "x"]]


def effect(
    config: dict[str, Any], name: str, value: Any, translate: Callable[..., MegatronModel] = convert
) -> str:
    """What one changed field does: "changed", "ignored", "refused", or "lost", which is the bug."""
    before = translate(config)
    try:
        after = translate(config | {name: value})
    except ValueError:
        return "refused"
    if (after.transformer, after.gpt_model) != (before.transformer, before.gpt_model):
        return "changed"
    return "ignored" if name in after.ignored else "lost"


@pytest.mark.parametrize("name", CONFIGS)
def test_no_field_is_lost(name: str) -> None:
    config = Qwen2Config(**CONFIGS[name]).to_dict()
    cases = [(field, new) for field in sorted(config) for new in changes(config[field])]
    own = cases[dist.get_rank() :: dist.get_world_size()]
    effects = [(field, new, effect(config, field, new)) for field, new in own]
    found = [item for items in gathered(effects) for item in items]
    assert sorted(field for field, _, _ in found) == sorted(field for field, _ in cases)
    assert [item for item in found if item[2] == "lost"] == []
    assert {item[2] for item in found} == {"changed", "ignored", "refused"}


def test_the_search_finds_a_converter_that_loses_a_field() -> None:
    def careless(config: dict[str, Any]) -> MegatronModel:
        return convert({name: item for name, item in config.items() if name != "rope_parameters"})

    config = Qwen2Config(**PERTURBED).to_dict()
    other = {**config["rope_parameters"], "factor": 8.0}
    assert effect(config, "rope_parameters", other) == "changed"
    assert effect(config, "rope_parameters", other, careless) == "lost"
