"""Every family's table: complete, true to the source's class, and nothing is lost."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from scenarios.convert import MegatronModel, ParallelLayout, convert
from scenarios.convert.converter import read_config, rows_of
from scenarios.convert.families import FAMILIES, REFUSED
from scenarios.convert.flags import flags, plain, to_yaml, words
from tests.convert_cases import DEEPSEEK_YARN, DEFAULT, LLAMA3, PUBLISHED, default, odd, published

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


# What converters in use were measured to get wrong, each on a configuration where it counts.
@pytest.mark.parametrize(
    ("model_type", "change", "expected"),
    [
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 32.0}}, {"rope_scaling_factor": 32.0}),
        ("llama", {}, {"rope_scaling": True, "seq_len_interpolation_factor": None}),
        (
            "llama",
            {"rope_scaling": None, "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
            {"rope_scaling": True, "rotary_base": 500000},
        ),
        (
            "qwen2",
            {"rope_theta": None, "rope_parameters": {**DEEPSEEK_YARN, "rope_theta": 10000.0}},
            {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 40.0},
        ),
        ("mixtral", {}, {"moe_router_pre_softmax": False}),
        ("qwen3_moe", {}, {"moe_router_pre_softmax": False}),
        ("qwen3_moe", {"norm_topk_prob": False}, {"moe_router_pre_softmax": True}),
        (
            "qwen3_moe",
            {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4},
            {"moe_layer_freq": (0, 0, 0, 1)},
        ),
        ("deepseek_v3", {}, {"moe_router_num_groups": 8, "moe_router_group_topk": 4}),
        ("gpt_oss", {"swiglu_limit": 5.0}, {"activation_func_clamp_value": 5.0}),
        ("gpt_oss", {"sliding_window": 64}, {"window_size": (63, 0)}),
        ("glm4_moe", {}, {"rotary_percent": 0.5, "add_qkv_bias": True}),
        ("qwen2_5_vl", {}, {"position_embedding_type": "mrope", "mrope_section": (16, 24, 24)}),
        ("gpt2", {}, {"position_embedding_type": "learned_absolute", "kv_channels": 64}),
        ("gemma", {}, {"embedding_scale": 2048**0.5, "layernorm_zero_centered_gamma": True}),
        ("gemma", {"hidden_act": "gelu"}, {"activation_func": "openai_gelu"}),
        ("gemma2", {}, {"softmax_scale": 1 / 12, "attention_softcap": 50.0, "logit_softcap": 30.0}),
        ("gemma3", {}, {"seq_len_interpolation_factor": 8.0, "local_rotary_base": 10000}),
        ("gemma3_text", {}, {"window_attn_skip_freq": ((1,) * 5 + (0,)) * 4 + (1, 1)}),
        ("glm4", {}, {"rotary_percent": 0.5, "rotary_interleaved": True, "post_norms": True}),
        ("olmoe", {}, {"qk_layernorm": False, "all_heads_qk_norm": True}),
    ],
)
def test_what_other_converters_lose(
    model_type: str, change: Config, expected: dict[str, Any]
) -> None:
    model = convert(published(model_type) | change)
    fields = model.transformer.model_dump() | model.gpt_model.model_dump()
    fields |= model.extra.model_dump() if model.extra is not None else {}
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("model_type", "change", "expected"),
    [
        ("llama", {"attention_bias": True}, "attention_bias True and mlp_bias False"),
        ("qwen3", {"attention_bias": True}, "a bias on all four projections"),
        ("mixtral", {"num_experts_per_tok": 1}, "of which a softmax is always 1"),
        ("mixtral", {"num_experts_per_tok": 9}, "expected at most 8 experts"),
        ("mixtral", {"router_jitter_noise": 0.1}, "noise"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "set norm_topk_prob to false"),
        ("qwen3_moe", {"mlp_only_layers": [48]}, "expected a layer below 48"),
        ("qwen3_moe", {"decoder_sparse_step": 49}, "leave no layer of experts"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok: got None"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
            "would choose other experts",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, "which the source's router does not compute"),
        ("deepseek_v3", {"n_group": 7}, "expected a divisor of the 256 experts"),
        ("deepseek_v3", {"topk_group": 9}, "expected at most n_group = 8"),
        ("deepseek_v3", {"num_experts_per_tok": 4}, "would choose other experts"),
        ("deepseek_v3", {"norm_topk_prob": False}, "expected true and 2 or more"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "the source norms latent vectors"),
        ("deepseek_v3", {"attention_bias": True}, "biases in latent attention"),
        ("deepseek_v3", {"rope_interleave": False}, "rotated halves"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("deepseek_v3", {"num_key_value_heads": 64}, "latent attention has no groups"),
        ("glm4_moe", {"head_dim": None}, "or give head_dim"),
        ("glm4_moe", {"head_dim": 126}, "rotates 63 of 126"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "another slope"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "expected 24 of"),
        ("gpt_oss", {"experts_per_token": 3}, "two spellings of one field"),
        ("bert", {"architectures": ["BertLMHeadModel"]}, "expected one of ['BertForPreTraining'"),
        ("bert", {"is_decoder": True}, "a decoder"),
        ("bert", {"position_embedding_type": "relative_key"}, "relative positions"),
        ("bert", {"hidden_act": "gelu_new"}, "BertLMHead has gelu built in"),
        ("bert", {"hidden_act": "relu"}, "hidden_act: got 'relu'"),
        ("bert", {"tie_word_embeddings": False}, "two biases of the output and reads one"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size: got 0"),
        ("bert", {"hidden_size": 1000}, "expected a multiple of the 16 heads"),
        ("gpt2", {"embd_pdrop": 0.0}, "one hidden_dropout for both"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "divided by the layer's number"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: got 'relu'"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "rope type 'su'"),
        ("qwen2_5_vl", {"rope_scaling": None}, "mrope_section: got None"),
        ("qwen2_5_vl", {"text_config": {"hidden_size": 1}}, "and 1 in text_config"),
        ("gemma", {"use_bidirectional_attention": True}, "attention to later tokens"),
        ("gemma", {"hidden_act": "silu"}, "another activation than tanh-GELU"),
        ("gemma", {"attention_bias": True}, "a bias on all four projections"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "expected a positive number or none"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "expected a positive number"),
        ("gemma2", {"layer_types": ["full_attention"]}, "expected 46 of"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "the source's class does not compute"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window: got None"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "expected objects"),
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "in layers with a window, too",
        ),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "expected rope_type"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope of layers with a window: got type 'linear'",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 500.0}}},
            "rope_theta: got 10000 and 500.0",
        ),
        ("gemma3", {"text_config": {"head_dim": 0}}, "head_dim: got 0"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "the source's class does not compute"),
        ("glm4", {"partial_rotary_factor": 1.0, "rope_scaling": DEEPSEEK_YARN}, "neighbours"),
        ("olmoe", {"clip_qkv": 8.0}, "clipped queries, keys and values"),
        ("mistral", {"layer_types": ["sliding_attention"] * 32}, "some layers only"),
    ],
)
def test_refused(model_type: str, change: Config, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        convert(published(model_type) | change)
    assert expected in str(caught.value)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_families_that_megatron_cannot_express(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"model_type '{model_type}' is not supported: the model"):
        convert(AutoConfig.for_model(model_type))


def test_ties_of_a_text_model_inside_a_larger_one() -> None:
    config = published("qwen2_5_vl")

    def tied(outer: bool, inner: bool, version: str) -> bool:
        around = {"tie_word_embeddings": outer, "transformers_version": version}
        text = {"text_config": {"tie_word_embeddings": inner}}
        return convert(config | around | text).gpt_model.share_embeddings_and_output_weights

    assert not tied(True, False, "4.57.1"), "transformers 4 reads the text model's"
    assert tied(False, True, "4.57.1")
    assert tied(False, True, "5.23.0")
    with pytest.raises(ValueError, match="tie_word_embeddings: got True, and False in text_config"):
        tied(True, False, "5.23.0")


def test_the_text_model_of_gemma_3_with_images() -> None:
    source = AutoConfig.for_model("gemma3", text_config={"num_hidden_layers": 12})
    inside, alone = convert(source), convert(source.text_config)
    assert inside.model_type == "gemma3"
    assert alone == inside.model_copy(
        update={"model_type": "gemma3_text", "ignored": alone.ignored}
    )
    assert "the text model is converted" in inside.ignored["vision_config"]


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


@pytest.mark.parametrize("model_type", DEFAULT)
def test_output_forms(model_type: str) -> None:
    model = convert(published(model_type))
    document = yaml.safe_load(to_yaml(model))
    assert document == json.loads(json.dumps(plain(model)))
    assert document["transformer"]["num_layers"] == model.transformer.num_layers
    no_flags = {
        "bert": "BERT has no flags",
        "gpt_oss": "yarn has no flags",
        "gemma": "extra modules ScaledEmbedding",
    }
    for name, reason in no_flags.items():
        if model_type.startswith(name):
            with pytest.raises(ValueError, match=reason):
                flags(model)
            return
    given_words = words(flags(model))
    assert given_words[given_words.index("--num-layers") + 1] == str(model.transformer.num_layers)
    assert all(isinstance(word, str) and word for word in given_words)


def test_the_time_of_a_conversion() -> None:
    """Printed against the limit of 50 ms; a busy machine fails no test."""
    times_ms = []
    for model_type in DEFAULT:
        start = time.perf_counter()
        convert(published(model_type))
        times_ms.append((time.perf_counter() - start) * 1e3)
    print(f"conversion: {min(times_ms):.2f} to {max(times_ms):.2f} ms")
    assert len(times_ms) == len(DEFAULT)


def test_neither_help_nor_conversion_imports_transformers_or_megatron() -> None:
    code = (
        "import sys; from scenarios import cli; cli.main(['convert', '--help']); "
        "from scenarios.convert import convert; convert({'model_type': 'llama'}); "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('transformers', 'megatron')]; "
        "assert not bad, bad"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=root)


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


def test_the_output_names_the_modules_that_bert_needs_besides() -> None:
    document = plain(convert(published("bert")))
    assert "gpt_model" not in document
    assert document["bert_model"]["num_tokentypes"] == 2
    assert document["bert_model"]["add_binary_head"]
    names = [module["module"].rpartition(".")[2] for module in document["extra_modules"]]
    assert names == ["SumThenNorm", "NormThenDropout"]
    with pytest.raises(ValueError, match="BertModel counts positions from 0 on every rank"):
        convert(published("bert"), layout=ParallelLayout(cp=2))
    with pytest.raises(ValueError, match="binary_head: got true without pooler"):
        convert(published("bert"), overrides={"pooler": False})


LAYOUTS = ["tp2", "pp4", "tp2,pp2", "pp2,vpp2", "pp4,first5,last3", "cp2", "pp3", "tp2,sp", "ep4"]


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_layouts(model_type: str, text: str) -> None:
    layout = ParallelLayout.parse(text)
    config = published(model_type)
    has_experts = model_type == "mixtral"
    wrong = (
        ("pp3" in text, "num_layers: got 32, expected a multiple of 3"),
        ("ep4" in text and not has_experts, "ep: got 4, expected 1"),
        ("tp2" in text and "sp" not in text and has_experts, "add sp to the layout"),
    )
    for applies, message in wrong:
        if applies:
            with pytest.raises(ValueError, match=message):
                convert(config, layout=layout)
            return
    model = convert(config, layout=layout)
    stages = model.transformer.stages()
    assert sorted(layer for parts in stages for part in parts for layer in part) == [*range(32)]
    assert len(stages) == layout.pp
    if text == "pp4,first5,last3":
        assert [len(parts[0]) for parts in stages] == [5, 12, 12, 3]
    if text == "pp2,vpp2":
        assert stages[1] == [range(8, 16), range(24, 32)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp2,tp4", "tp is given twice"),
        ("dp2", "got 'dp2', expected parts like"),
        ("sp", "needs tp > 1"),
        ("vpp2", "needs pp > 1"),
        ("first3", "need pp > 1"),
    ],
)
def test_layouts_that_say_no_layout(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ParallelLayout.parse(text)


def test_every_family_has_its_cases() -> None:
    assert set(DEFAULT) == set(PUBLISHED) == set(FAMILIES) - {"qwen2_5_vl_text"}
