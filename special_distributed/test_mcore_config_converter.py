"""Hugging Face to Megatron-LM configurations on TP2 x PP2: every rank converts, and all agree.

A result that depended on the rank or on hash order would build parts that do not fit together. So
each rank converts for the layout and cuts out its own part; the parts must add up to the whole
model. On 8 ranks the layout has CP2 besides. The search for lost fields, one conversion for each
changed field, is shared out over the ranks.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    BertConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from scenarios.convert import MegatronModel, ParallelLayout, convert
from scenarios.convert.shrink import shrink
from scenarios.convert.source_model import SourceModel
from scenarios.convert.tensor_files import TensorFolder
from scenarios.convert.weight_files import to_megatron
from scenarios.convert.weights import Parameter, join_parts, parameters

pytestmark = pytest.mark.usefixtures("world")

RANK_COUNTS = (4, 8)
TP, PP = 2, 2
LAYOUT = ParallelLayout(tp=TP, pp=PP)
EXPERTS = ParallelLayout(tp=TP, pp=PP, ep=2, etp=1, sp=True)
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
CONFIGS: dict[str, tuple[type, dict[str, Any], ParallelLayout]] = {
    "default": (Qwen2Config, {}, LAYOUT),
    "perturbed": (Qwen2Config, PERTURBED, LAYOUT),
    "llama": (LlamaConfig, {"num_key_value_heads": 8}, LAYOUT),
    "qwen3": (Qwen3Config, {}, LAYOUT),
    "qwen2_moe": (Qwen2MoeConfig, {}, EXPERTS),
    "qwen3_moe": (Qwen3MoeConfig, {}, EXPERTS),
    "qwen3_next": (Qwen3NextConfig, {"num_experts": 64}, EXPERTS),
    "bert": (BertConfig, {}, LAYOUT),
    "gemma3_text": (Gemma3TextConfig, {}, LAYOUT),
    "olmoe": (OlmoeConfig, {}, EXPERTS),
    "deepseek_v3": (DeepseekV3Config, {}, EXPERTS.model_copy(update={"first": 30, "last": 31})),
}
WITHOUT_CP = ("bert", "qwen3_next")
"""megatron-core's BertModel and GatedDeltaNet have no context parallelism."""


def config_of(name: str) -> Any:
    """The configuration as transformers holds it."""
    kind, fields, _ = CONFIGS[name]
    return kind(**fields)


def gathered(item: object) -> list[Any]:
    """The item of every rank, in rank order."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def context_parallel_size() -> int:
    """1 on four ranks, 2 on eight."""
    return dist.get_world_size() // (TP * PP)


def own_place() -> tuple[int, int]:
    """This rank's tp rank and pp rank, in Megatron's order: tp, then cp, then pp."""
    rank = dist.get_rank()
    return rank % TP, rank // (TP * context_parallel_size())


def own_part(model: MegatronModel, tp_rank: int, pp_rank: int) -> dict[str, tuple[int, set[int]]]:
    """What one rank builds: name -> (size of the whole, this rank's indices of it)."""
    fields = model.transformer

    def cut(numel: int, index: int, degree: int) -> tuple[int, set[int]]:
        return numel, set(range(index * numel // degree, (index + 1) * numel // degree))

    layers = fields.stages()[pp_rank][0]
    return {
        "layers": (fields.num_layers, set(layers)),
        "heads": cut(fields.num_attention_heads, tp_rank, TP),
        "query_groups": cut(fields.num_query_groups, tp_rank, TP),
        "ffn": cut(fields.ffn_hidden_size, tp_rank, TP),
        "vocabulary": cut(model.gpt_model.vocab_size, tp_rank, TP),
        "experts": cut(fields.num_moe_experts or 2, tp_rank, 2),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_agree_and_their_parts_make_the_model(name: str) -> None:
    cp = 1 if name in WITHOUT_CP else context_parallel_size()
    layout = CONFIGS[name][2].model_copy(update={"cp": cp})
    model = convert(config_of(name), layout=layout)
    models = gathered(model.model_dump_json())
    assert models == [models[0]] * len(models)
    parts = gathered(own_part(model, *own_place()))
    for key, (numel, _) in parts[0].items():
        pieces = [part[key][1] for part in parts]
        assert set.union(*pieces) == set(range(numel)), key
        assert sum(map(len, pieces)) == numel * len(parts) // 2, key


def test_the_files_of_all_ranks_make_the_source() -> None:
    """Rank 0 converts; every rank reads its own folder, and all together hold the source's bits."""
    config = shrink(AutoConfig.for_model("qwen3", tie_word_embeddings=False).to_dict())
    tp_rank, pp_rank = own_place()
    with tempfile.TemporaryDirectory() as own:
        folders = gathered(own)
        root = Path(folders[0])
        if dist.get_rank() == 0:
            torch.manual_seed(3)
            SourceModel(config).save(root / "hf")
            to_megatron(root / "hf", root / "megatron", config, layout=LAYOUT)
        dist.barrier()
        mine = TensorFolder(root / "megatron" / f"tp{tp_rank}_pp{pp_rank}")
        states = gathered({name: mine.read(name) for name in mine})
        source = load_file(root / "hf" / "model.safetensors")
        dist.barrier()
    model = convert(config, layout=LAYOUT)
    for parameter in parameters(model):
        parts = _parts(model, parameter, states)
        whole = join_parts(parts, parameter.cut)
        if parameter.name.endswith("mlp.linear_fc1.weight"):
            names = [f"model.layers.{parameter.layer}.mlp.{n}_proj.weight" for n in ("gate", "up")]
            assert torch.equal(whole, torch.cat([source[name] for name in names]))
        elif parameter.name == "output_layer.weight":
            assert torch.equal(whole, source["lm_head.weight"])
    assert sum(t.numel() for state in states for t in state.values()) >= sum(
        t.numel() for t in source.values()
    )


def _parts(
    model: MegatronModel, parameter: Parameter, states: list[dict[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """A parameter's parts, by tp rank, from the states of all ranks."""
    stages = [parts[0] for parts in model.transformer.stages()]
    if parameter.layer is None:
        stage = 0 if parameter.name.startswith("embedding") else PP - 1
        name = parameter.name
    else:
        stage = next(i for i, layers in enumerate(stages) if parameter.layer in layers)
        name = parameter.pattern.format(layer=stages[stage].index(parameter.layer))
    first = stage * TP * context_parallel_size()
    return [states[first + tp_rank][name] for tp_rank in range(TP)]


def test_a_norm_over_all_heads_is_one_norm_over_all_ranks() -> None:
    """OLMoE's norm with its heads cut over the ranks: outputs and gradients of the whole norm."""
    from scenarios.convert.extra_attention import AllHeadsRMSNorm

    rank, world_size = dist.get_rank(), dist.get_world_size()
    heads, head_dim, eps = 2 * world_size, 6, 1e-5
    mine = slice(2 * rank, 2 * rank + 2)
    torch.manual_seed(5)
    sizes = torch.arange(1.0, heads + 1)[:, None]  # heads of very different size
    states = torch.randn(3, 2, heads, head_dim) * sizes
    weight, gradient = torch.randn(heads, head_dim), torch.randn(states.shape)

    config = SimpleNamespace(num_attention_heads=heads)
    norm = AllHeadsRMSNorm(
        config, head_dim, eps, heads="num_attention_heads", tp_group=dist.group.WORLD
    )
    with torch.no_grad():
        norm.weight.copy_(weight[mine].flatten())
    part = states[:, :, mine].clone().requires_grad_()
    normed = norm(part)
    normed.backward(gradient[:, :, mine])

    whole, whole_weight = (t.clone().requires_grad_() for t in (states, weight))
    expected = torch.nn.functional.rms_norm(whole, whole.shape[-2:], whole_weight, eps)
    expected.backward(gradient)
    torch.testing.assert_close(normed, expected[:, :, mine])
    torch.testing.assert_close(part.grad, whole.grad[:, :, mine])
    torch.testing.assert_close(norm.weight.grad, whole_weight.grad[mine].flatten())

    alone = torch.nn.functional.rms_norm(part, part.shape[-2:], weight[mine], eps)
    assert not torch.allclose(alone, normed, rtol=1e-2), "the ranks' own norms are others"

    groups = [dist.new_group([one]) for one in range(world_size)]
    saved = norm.sharded_state_dict("q_layernorm.", metadata={"dp_cp_group": groups[rank]})
    shard = saved["q_layernorm.weight"]
    assert shard.global_shape == (heads * head_dim,)
    assert shard.global_offset == (rank * 2 * head_dim,)
    with pytest.raises(ValueError, match=f"expected a multiple of tp {world_size}"):
        AllHeadsRMSNorm(
            SimpleNamespace(num_query_groups=1),
            *(head_dim, eps),
            heads="num_query_groups",
            tp_group=dist.group.WORLD,
        )


def test_the_perturbed_model_is_what_the_table_says() -> None:
    model = convert(config_of("perturbed"), layout=LAYOUT)
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
    if after.model_copy(update={"ignored": before.ignored}) != before:
        return "changed"
    return "ignored" if name in after.ignored or name in before.ignored else "lost"


@pytest.mark.parametrize("name", CONFIGS)
def test_no_field_is_lost(name: str) -> None:
    config = config_of(name).to_dict()
    cases = [
        (field, new)
        for field in sorted(config)
        for new in changes(config[field])
        if new != config[field]
    ]
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
