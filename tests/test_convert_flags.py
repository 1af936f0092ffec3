"""Command-line flags: Megatron-LM's parser makes of them the configuration that was converted."""

import dataclasses
import functools
import inspect
import json
import shlex
from argparse import Namespace
from typing import Any

import pytest
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scenarios import cli
from scenarios.convert import MegatronModel, ParallelLayout, convert, proof
from scenarios.convert.build import gpt_model_arguments, transformer_config
from scenarios.convert.flags import flags, words
from scenarios.convert.proof import prove
from tests import megatron_arguments
from tests.convert_cases import DEFAULT, LLAMA3, published
from tests.convert_odd import odd

Config = dict[str, Any]
PARSER = functools.cache(megatron_arguments.parser)
# What training or a machine is set to, and functions that are made anew each time.
NOT_THE_MODELS = frozenset(
    (
        *("params_dtype", "pipeline_dtype", "apply_rope_fusion", "use_cpu_initialization"),
        *("activation_func", "bias_activation_fusion"),
        *("init_method", "output_layer_init_method", "embedding_init_method"),
    )
)
LAYOUTS = ["tp1", "tp2,sp", "pp2", "pp4,vpp2", "pp2,first3", "cp2", "tp2,pp2,sp,ep2", "ep2,etp2"]


def parsed(model: MegatronModel) -> Namespace:
    return megatron_arguments.validated(PARSER().parse_args(words(flags(model))))


def config_of_flags(model: MegatronModel, **choices: Any) -> Any:
    """The TransformerConfig that Megatron-LM makes of the flags, on a CPU."""
    return megatron_arguments.core_config(parsed(model), apply_rope_fusion=False, **choices)


def differing(model: MegatronModel) -> dict[str, tuple[Any, Any]]:
    """Fields of TransformerConfig and arguments of GPTModel: from flags, and as converted."""
    from megatron.core.models.gpt import GPTModel

    args = parsed(model)
    one, other = config_of_flags(model), transformer_config(model)
    assert type(one) is type(other)
    pairs = {
        field.name: (getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
        if field.name not in NOT_THE_MODELS
    }
    defaults = {n: p.default for n, p in inspect.signature(GPTModel).parameters.items()}
    given_arguments = defaults | megatron_arguments.gpt_arguments(args)
    for name, value in gpt_model_arguments(model).items():
        if not (model.mla is not None and name == "rotary_base"):
            pairs[f"GPTModel.{name}"] = (given_arguments[name], value)
    return {
        name: pair
        for name, pair in pairs.items()
        if (list(pair[0]) if isinstance(pair[0], tuple) else pair[0])
        != (list(pair[1]) if isinstance(pair[1], tuple) else pair[1])
    }


def has_flags(model: MegatronModel) -> bool:
    try:
        flags(model)
    except ValueError:
        return False
    return True


WITHOUT = {"bert", "gpt_oss", "gemma", "gemma2", "gemma3", "gemma3_text", "qwen3_next"}


@pytest.mark.parametrize("model_type", sorted({*DEFAULT} - WITHOUT))
def test_the_parser_makes_the_same_model_of_a_published_size(model_type: str) -> None:
    assert differing(convert(published(model_type) | {"dtype": "bfloat16"})) == {}


@settings(max_examples=100, derandomize=True, suppress_health_check=[*HealthCheck])
@given(st.sampled_from(sorted(DEFAULT)).flatmap(odd), st.sampled_from(LAYOUTS))
def test_the_parser_makes_the_same_model_of_an_odd_one(config: Config, layout: str) -> None:
    try:
        model = convert(config, layout=ParallelLayout.parse(layout))
    except ValueError:
        model = convert(config)
    if has_flags(model):
        assert differing(model) == {}


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2_moe", "deepseek_v3", "glm4_moe"])
def test_logits_of_the_model_that_the_flags_make(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's GELU is the fused one there: the same function in another form."""
    monkeypatch.setattr(proof, "transformer_config", config_of_flags)
    proven = prove(published(model_type))
    assert proven.passed, proven.lines()


def test_gelu_in_both_forms() -> None:
    for name, fused in (("gelu", False), ("gelu_new", True)):
        config = config_of_flags(convert(published("gpt2") | {"activation_function": name}))
        assert config.activation_func is F.gelu
        assert config.bias_activation_fusion == fused, "the fusion computes GELU by tanh"


def test_latent_attention_without_yarn_switches_a_fusion_off() -> None:
    config = published("deepseek_v3") | {"rope_scaling": None}
    args = parsed(convert(config))
    assert (args.rope_type, args.apply_rope_fusion) == ("rope", False)
    assert megatron_arguments.core_config(args).rope_type == "rope"


@pytest.mark.parametrize(
    ("model_type", "change", "expected"),
    [
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 32.0}}, "--rope-scaling-factor"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "--rotary-seq-len-interpolation-factor",
        ),
        ("gpt_oss", {}, "yarn has no flags"),
        ("bert", {}, "BERT has no flags: --spec"),
        ("deepseek_v3", {"rope_theta": 10000.5}, "the flag takes integers only"),
        ("qwen2", {"architectures": ["Qwen2ForTokenClassification"]}, "head has no flags"),
    ],
)
def test_what_no_flag_can_say_is_refused(model_type: str, change: Config, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        flags(convert(published(model_type) | change))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"activation_func": "silu", "gated_linear_unit": False}, "have no flag together"),
        ({"activation_func": "gelu"}, "have no flag together"),
    ],
)
def test_activations_without_a_flag(overrides: Config, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        flags(convert(published("llama"), overrides=overrides))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--rope-theta 5", "unrecognized arguments"),
        ("--moe-layer-freq '[1, 0]'", "invalid"),
        ("--normalization Norm", "invalid choice"),
        ("--rotary-base 1.5", "invalid int"),
    ],
)
def test_the_parser_refuses_what_megatron_refuses(line: str, expected: str) -> None:
    with pytest.raises(megatron_arguments.Refused, match=expected):
        PARSER().parse_args(shlex.split(line))


def test_the_comparison_finds_a_flag_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert(published("mixtral"))
    lost = {name: value for name, value in flags(model).items() if name != "--normalization"}
    monkeypatch.setitem(globals(), "flags", lambda _: lost | {"--kv-channels": 64})
    assert set(differing(model)) == {"normalization", "kv_channels"}


def test_the_line_that_is_printed_is_one_for_a_shell(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = published("qwen3_moe") | {"mlp_only_layers": [1], "use_sliding_window": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["convert", str(tmp_path / "config.json"), "--format", "flags"]) == 0
    line = capsys.readouterr().out
    assert "'[1,0,1" in line
    assert shlex.split(line) == words(flags(convert(config)))
    model = convert(published("qwen2_5_vl"))
    assert parsed(model).mrope_section == [16, 24, 24]
