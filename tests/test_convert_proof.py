"""Conversions proven by logits, and mutations of them that the proof must catch.

``PRIMITIVES_PROOF_CASES`` says how many random configurations of each family are proven; ``make
convert-proofs`` proves 50.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from primitives import env
from scenarios.convert import ParallelLayout, convert, mapping, proof
from scenarios.convert.build import transformer_config
from scenarios.convert.megatron_on_cpu import megatron_on_cpu
from scenarios.convert.proof import prove, relative_error
from scenarios.convert.shrink import shrink
from tests.convert_cases import DEEPSEEK_YARN, DEFAULT, LLAMA3, default, odd, published

Config = dict[str, Any]
CASES = int(env.PROOF_CASES.get())
SAMPLE = int(env.PROOF_CASES.default)


@pytest.mark.parametrize("kind", [default, published])
@pytest.mark.parametrize("model_type", DEFAULT)
def test_proof(model_type: str, kind: Callable[[str], Config]) -> None:
    config = kind(model_type)
    proven = prove(config)
    assert proven.passed, proven.lines()
    assert next(iter(proven.errors)) == "embedding"
    assert len(proven.errors) == 3 + 3 * shrink(config).get("num_hidden_layers", 4)


@pytest.mark.parametrize("model_type", DEFAULT)
def test_proof_of_odd_models(model_type: str) -> None:
    @settings(
        max_examples=CASES,
        derandomize=CASES <= SAMPLE,
        suppress_health_check=[*HealthCheck],
        print_blob=True,
    )
    @given(odd(model_type), st.integers(0, 1000))
    def check(config: Config, seed: int) -> None:
        proven = prove(config, seed=seed)
        assert proven.passed, proven.lines()

    check()


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *(
            ("llama", "Llama"),
            ("qwen2", "Qwen2"),
            ("mistral", "Mistral"),
            ("qwen3_moe", "Qwen3Moe"),
        ),
        *(("gemma2", "Gemma2"), ("glm4", "Glm4")),
    ],
)
def test_proof_of_token_classification(model_type: str, name: str) -> None:
    labels = {str(index): f"L{index}" for index in range(5)}
    config = published(model_type) | {"architectures": [f"{name}ForTokenClassification"]}
    proven = prove(config | {"id2label": labels})
    assert proven.passed, proven.lines()


ROPE = {"rope_theta": None, "rope_scaling": None}
MUTATIONS: list[tuple[str, Config, Config, str]] = [
    # family, change of its configuration, the Megatron field that is wrong, where it shows
    ("llama", {}, {"rope_scaling": False}, "layer 0 attention"),
    (
        "llama",
        {},
        {"rope_scaling": False, "seq_len_interpolation_factor": 8.0},
        "layer 0 attention",
    ),
    ("llama", {}, {"rotary_base": 10000}, "layer 0 attention"),
    ("llama", {}, {"layernorm_epsilon": 1e-3}, "layer 0 attention"),
    ("llama", {}, {"activation_func": "gelu"}, "layer 0 mlp"),
    (
        "qwen2",
        {**ROPE, "rope_parameters": {**DEEPSEEK_YARN, "rope_theta": 10000.0}},
        {"position_embedding_type": "rope"},
        "layer 0 attention",
    ),
    ("mistral", {}, {"window_size": None}, "layer 0 attention"),
    ("mistral", {}, {"window_size": (7, 0)}, "layer 0 attention"),
    ("mixtral", {}, {"moe_router_pre_softmax": True}, "layer 0 mlp"),
    ("qwen3_moe", {}, {"moe_router_pre_softmax": True}, "layer 0 mlp"),
    ("qwen2_moe", {}, {"moe_router_pre_softmax": False}, "layer 0 mlp"),
    ("deepseek_v3", {}, {"moe_router_topk_scaling_factor": 1.0}, "layer 1 mlp"),
    (
        "deepseek_v3",
        {},
        {"moe_router_num_groups": None, "moe_router_group_topk": None},
        "layer 1 mlp",
    ),
    ("deepseek_v3", {}, {"mscale_all_dim": 0.0}, "layer 0 attention"),
    ("glm4_moe", {}, {"rotary_percent": 1.0}, "layer 0 attention"),
    ("qwen2_5_vl", {}, {"mrope_section": (24, 24, 16)}, "layer 0 attention"),
    ("gpt_oss", {}, {"glu_linear_offset": 0.0}, "layer 0 mlp"),
    ("gpt_oss", {}, {"activation_func_clamp_value": None}, "layer 0 mlp"),
    ("gpt_oss", {}, {"window_attn_skip_freq": (0, 1, 0, 1)}, "layer 0 attention"),
    ("gpt2", {}, {"activation_func": "gelu"}, "layer 0 mlp"),
    ("gemma", {}, {"embedding_scale": None}, "embedding"),
    ("gemma", {}, {"layernorm_zero_centered_gamma": False}, "layer 0 attention"),
    ("gemma", {}, {"activation_func": "gelu"}, "layer 0 mlp"),
    ("gemma2", {}, {"softmax_scale": None}, "layer 0 attention"),
    ("gemma2", {}, {"attention_softcap": None}, "layer 0 attention"),
    ("gemma2", {}, {"logit_softcap": None}, "logits"),
    ("gemma2", {}, {"window_attn_skip_freq": (0, 1, 0, 1)}, "layer 0 attention"),
    ("gemma3_text", {}, {"local_rotary_base": 1000000}, "layer 0 attention"),
    (
        "gemma3_text",
        {},
        {"local_rotary_base": 1000000, "rotary_base": 10000},
        "layer 0 attention",
    ),
    ("gemma3_text", {}, {"rotary_base": 10000}, "layer 2 attention"),
    ("gemma3", {}, {"seq_len_interpolation_factor": None}, "layer 2 attention"),
    ("glm4", {}, {"rotary_interleaved": False}, "layer 0 attention"),
    ("glm4", {}, {"rotary_percent": 1.0}, "layer 0 attention"),
    ("olmoe", {}, {"moe_router_pre_softmax": False}, "layer 0 mlp"),
]


@pytest.mark.parametrize(("model_type", "change", "wrong", "place"), MUTATIONS)
def test_a_wrong_field_is_caught(
    model_type: str, change: Config, wrong: Config, place: str
) -> None:
    proven = prove(published(model_type) | change, overrides=wrong)
    assert not proven.passed
    assert proven.first_difference == place
    assert proven.errors[place] > 10 * proof.TOLERANCE
    assert f"first difference: {place}" in "\n".join(proven.lines())


@pytest.mark.parametrize(
    ("model_type", "wrong", "left"),
    [
        ("qwen3", {"qk_layernorm": False}, "k_norm.weight"),
        ("qwen2", {"add_qkv_bias": False}, "k_proj.bias"),
        ("gpt_oss", {"softmax_type": "vanilla"}, "sinks"),
        ("qwen2_moe", {"moe_shared_expert_gate": False}, "shared_expert_gate.weight"),
        ("deepseek_v3", {"moe_router_enable_expert_bias": False}, "e_score_correction_bias"),
        ("gemma2", {"post_norms": False}, "post_attention_layernorm.weight"),
        ("glm4", {"post_norms": False}, "post_mlp_layernorm.weight"),
        ("gemma3_text", {"qk_layernorm": False}, "k_norm.weight"),
        ("olmoe", {"all_heads_qk_norm": False}, "k_norm.weight"),
    ],
)
def test_a_missing_part_leaves_tensors_over(model_type: str, wrong: Config, left: str) -> None:
    with pytest.raises(ValueError, match=rf"{left}.*belongs to no parameter"):
        prove(published(model_type), overrides=wrong)


def test_swapped_gate_and_up_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    join = mapping.Stacked.join
    monkeypatch.setattr(mapping.Stacked, "join", lambda self, parts, s: join(self, parts[::-1], s))
    assert prove(published("qwen3")).first_difference == "layer 0 mlp"


def test_heads_that_are_not_kept_in_groups_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping.QKV, "join", lambda self, parts, shape: torch.cat(parts))
    assert prove(published("llama")).first_difference == "layer 0 attention"


def test_a_difference_in_a_later_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    read = proof.HuggingFaceWeights.read

    def bent(self: Any, parameter: Any) -> torch.Tensor:
        tensor = read(self, parameter)
        if parameter.name == "decoder.layers.2.mlp.linear_fc2.weight":
            tensor = tensor + 0.01
        return tensor

    monkeypatch.setattr(proof.HuggingFaceWeights, "read", bent)
    assert prove(published("llama")).first_difference == "layer 2 mlp"


def test_nothing_that_is_not_a_number_passes() -> None:
    good = torch.ones(1, 2, 3)
    assert relative_error(good, good) == 0
    assert relative_error(good * float("nan"), good) == float("inf")
    assert relative_error(good[:, :1], good) == float("inf")


def test_torch_is_as_before_after_a_proof() -> None:
    state, current_device = torch.get_rng_state(), torch.cuda.current_device
    with megatron_on_cpu():
        assert dist.is_initialized()
        assert torch.ones(1, device="cuda").device == torch.device("cpu")
        torch.rand(3)
    assert torch.cuda.current_device is current_device
    assert torch.equal(torch.get_rng_state(), state)
    assert not dist.is_initialized()


LAYOUTS = [
    "tp2,sp",
    "pp4",
    "pp4,first5,last3",
    "pp2,vpp2",
    "pp4,vpp2,first4,last4",
    "tp2,pp2,sp,cp2",
]


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_megatron_accepts_the_layout_and_deals_the_same_layers(model_type: str, text: str) -> None:
    """megatron-core's own checks, and its own rule for which stage has which layers."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    layout = ParallelLayout.parse(text)
    model = convert(published(model_type), layout=layout)
    config = transformer_config(model)
    for stage, parts in enumerate(model.transformer.stages()):
        for part, layers in enumerate(parts):
            chosen = {"vp_stage": part if layout.vpp > 1 else None, "pp_rank": stage}
            assert get_num_layers_to_build(config, **chosen) == len(layers)
            assert get_transformer_layer_offset(config, **chosen) == layers[0]


@pytest.mark.parametrize("model_type", DEFAULT)
def test_megatron_accepts_every_published_size(model_type: str) -> None:
    model = convert(published(model_type) | {"dtype": "bfloat16"})
    config = transformer_config(model)
    assert config.params_dtype == torch.bfloat16
    assert config.mtp_num_layers == (model.transformer.mtp_num_layers or None)
    assert (type(config).__name__ == "MLATransformerConfig") == (model.mla is not None)
    for name, value in model.transformer.model_dump(exclude_unset=True).items():
        if value is not None and name not in ("activation_func", "mtp_num_layers"):
            actual = getattr(config, name)
            assert (tuple(actual) if isinstance(value, tuple) else actual) == value, name


def test_a_proof_needs_more_than_an_agreement_of_configurations() -> None:
    """The small model keeps what the large one has: none of its mechanisms is shrunk away."""
    small = shrink(published("llama"))
    assert small["rope_scaling"] == LLAMA3
    assert small["num_attention_heads"] // small["num_key_value_heads"] == 4
    assert shrink(published("deepseek_v3"))["n_group"] == 4
    assert (
        shrink(published("gpt_oss"))["layer_types"] == ["sliding_attention", "full_attention"] * 2
    )
    types = ["sliding_attention"] * 5 + ["full_attention"]
    later = shrink(published("gemma3_text") | {"num_hidden_layers": 6, "layer_types": types})
    assert later["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]
