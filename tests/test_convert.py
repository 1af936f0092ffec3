"""The converter: every Qwen2 field counts, is named as irrelevant, or is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from scenarios.convert import MegatronModel, ParallelLayout, convert
from scenarios.convert.flags import flags

TINY: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def error_of(config: Any, **choices: Any) -> str:
    with pytest.raises(ValueError) as caught:
        convert(config, **choices)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_default_qwen2_field_by_field() -> None:
    model = convert(Qwen2Config())
    assert model.transformer.model_dump(exclude_defaults=True) == {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 22016,
        "num_attention_heads": 32,
        "num_query_groups": 32,
        "kv_channels": 128,
        "layernorm_epsilon": 1e-6,
        "init_method_std": 0.02,
        "attention_dropout": 0.0,
        "normalization": "RMSNorm",
        "activation_func": "silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
    }
    assert model.gpt_model.model_dump(exclude_defaults=True) == {
        "vocab_size": 151936,
        "max_sequence_length": 32768,
        "share_embeddings_and_output_weights": False,
        "position_embedding_type": "rope",
    }


def test_three_ways_to_give_a_configuration(tmp_path: Path) -> None:
    config = Qwen2Config(**TINY)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert convert(config) == convert(config.to_dict()) == convert(path) == convert(str(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not a config.json"),
        ("[]", "got list, expected an object"),
        (
            '{"model_type": "qwen2", "hidden_size": 8, "hidden_size": 16}',
            "'hidden_size' is given twice",
        ),
    ],
)
def test_broken_files(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert expected in error_of(path)
    assert "cannot be read" in error_of(tmp_path / "nope.json")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt5"}, "model_type: got 'gpt5', expected one of"),
    ({"hiden_size": 64}, "unknown field 'hiden_size' = 64; did you mean 'hidden_size'?"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', which asks for another activation"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "another head"),
    ({"quantization_config": {"bits": 4}}, "quantized weights"),
    ({"use_mrope": True}, "multimodal"),
    ({"hidden_size": 60}, "hidden_size: got 60, expected a multiple of the 8 heads"),
    ({"num_key_value_heads": 3}, "num_query_groups: got 3, expected a divisor"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: got 0"),
    ({"num_attention_heads": 0}, "num_attention_heads: got 0"),
    ({"num_hidden_layers": "4"}, "num_hidden_layers: got '4'"),
    ({"vocab_size": 1024.0}, "vocab_size: got 1024.0"),
    ({"use_sliding_window": 1}, "use_sliding_window: got 1"),
    ({"rms_norm_eps": 0.0}, "layernorm_epsilon: got 0.0"),
    ({"attention_dropout": 1.5}, "attention_dropout: got 1.5"),
    ({"dtype": "float64"}, "dtype: got 'float64'"),
    ({"dtype": "bfloat16", "torch_dtype": "float16"}, "contradict"),
    (
        {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0},
        "sliding_window: got 0",
    ),
    ({"layer_types": ["sliding_attention"] * 4}, "layer_types: got"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types: got"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
    ({"rope_scaling": {"rope_type": "linear", "beta": 2.0}}, "no parameter 'beta'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope factor: got None"),
    ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "no parameter 'factor'"),
    (
        {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}},
        "rope type: got 'yarn'",
    ),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "contradict each other"),
    ({"rope_scaling": YARN | {"attention_factor": 1.1}}, "attention_factor: got 1.1"),
    ({"rope_parameters": {"rope_theta": 5000.0}, "rope_theta": 6000.0}, "got 6000.0 and 5000.0"),
    ({"rope_theta": 5000.5}, "expected a whole number"),
    ({"rope_theta": float("inf")}, "rope_theta: got inf"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": 3}, "rope_parameters: got 3"),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        "low_freq_factor: got 2.0, Megatron-LM has 1 built in",
    ),
]


@pytest.mark.parametrize(("change", "expected"), REFUSED)
def test_refused(change: dict[str, Any], expected: str) -> None:
    assert expected in error_of(TINY | change)


def test_sliding_window_layers() -> None:
    window = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    model = convert(TINY | window)
    assert model.transformer.window_size == (31, 0), "32 tokens, itself included"
    assert model.transformer.window_attn_skip_freq == (0, 1, 1, 1)
    assert convert(Qwen2Config(**TINY, **window)).transformer == model.transformer
    assert "max_window_layers" not in model.ignored
    assert convert(TINY | {"max_window_layers": 1}).ignored["max_window_layers"]


def test_overrides() -> None:
    model = convert(TINY, overrides={"hidden_dropout": 0.1, "vocab_size": 2048})
    assert (model.transformer.hidden_dropout, model.gpt_model.vocab_size) == (0.1, 2048)
    message = error_of(TINY, overrides={"hiden_dropout": 0.1})
    assert (
        "override 'hiden_dropout' is no Megatron field; did you mean 'hidden_dropout'?" in message
    )
    assert "num_layers: got 'x'" in error_of(TINY, overrides={"num_layers": "x"})


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"tp": 8}, "num_query_groups: got 4, expected a multiple of 8"),
        ({"tp": 3}, "num_attention_heads: got 8, expected a multiple of 3"),
        ({"pp": 3}, "num_layers: got 4, expected a multiple of 3"),
        ({"cp": 3}, "max_sequence_length: got 256, expected a multiple of 6"),
    ],
)
def test_layouts_that_do_not_divide(layout: dict[str, int], expected: str) -> None:
    assert expected in error_of(TINY, layout=ParallelLayout(**layout))
    fits = ParallelLayout(tp=4, pp=4, cp=4)
    assert convert(TINY, layout=fits).transformer.tensor_model_parallel_size == 4


def test_flags() -> None:
    config = TINY | {"dtype": "bfloat16", "rope_theta": 1e6}
    given = flags(convert(config, layout=ParallelLayout(tp=2)))
    assert given["--num-query-groups"] == 4
    assert given["--rotary-base"] == 1000000
    switches = ("--swiglu", "--bf16", "--group-query-attention", "--disable-bias-linear")
    assert all(given[flag] is True for flag in switches)
    assert "--fp16" not in given
    assert given["--tensor-model-parallel-size"] == 2
    with pytest.raises(ValueError, match="yarn has no flags"):
        flags(convert(TINY | {"rope_scaling": YARN}))


ROPES: list[dict[str, Any]] = [
    {"rope_theta": 1000000.0},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 20000.0},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
    },
    {"rope_scaling": YARN, "rope_theta": 1000000.0},
    {"rope_parameters": YARN | {"factor": 40.0, "rope_theta": 10000.0}},
    {"rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
]


def megatron_rotary(model: MegatronModel) -> tuple[torch.Tensor, float]:
    """Frequencies and the factor on cos and sin, as Megatron-LM computes them from the fields."""
    fields, gpt = model.transformer, model.gpt_model
    dim = fields.kv_channels
    frequency = gpt.rotary_base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if gpt.seq_len_interpolation_factor is not None:
        frequency = frequency / gpt.seq_len_interpolation_factor
    if gpt.rope_scaling:
        factor, original = gpt.rope_scaling_factor, 8192
        turns = original * frequency / (2 * math.pi)
        blend = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequency = (1 - blend) * frequency / factor + blend * frequency
    if gpt.position_embedding_type != "yarn":
        return frequency, 1.0
    factor = fields.yarn_rotary_scaling_factor or 0.0
    original = fields.yarn_original_max_position_embeddings or 0

    def edge(turns: float | None) -> float:
        length = original / ((turns or 0.0) * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(gpt.rotary_base))

    low, high = edge(fields.yarn_beta_fast), edge(fields.yarn_beta_slow)
    if fields.yarn_correction_range_round_to_int:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    place = torch.arange(dim // 2, dtype=torch.float64)
    ramp = ((place - low) / (high - low)).clamp(0, 1)
    frequency = frequency / factor * ramp + frequency * (1 - ramp)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    if fields.yarn_mscale is None or fields.yarn_mscale_all_dim is None:
        return frequency, mscale(1)
    return frequency, mscale(fields.yarn_mscale) / mscale(fields.yarn_mscale_all_dim)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_frequencies_are_the_sources(rope: dict[str, Any]) -> None:
    """Hugging Face's own module and Megatron-LM's formulas on the converted fields agree."""
    config = TINY | {"hidden_size": 256} | json.loads(json.dumps(rope))
    embedding = Qwen2RotaryEmbedding(Qwen2Config(**json.loads(json.dumps(config))))
    frequency, factor = megatron_rotary(convert(config))
    torch.testing.assert_close(frequency, embedding.inv_freq.double(), rtol=2e-5, atol=0)
    assert math.isclose(factor, embedding.attention_scaling, rel_tol=1e-12)
    assert convert(Qwen2Config(**config)).gpt_model == convert(config).gpt_model
