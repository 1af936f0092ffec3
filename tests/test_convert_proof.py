"""Conversions proven by logits.

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
from scenarios.convert.megatron_on_cpu import megatron_on_cpu
from scenarios.convert.proof import prove, relative_error
from scenarios.convert.shrink import shrink
from tests.convert_cases import DEFAULT, LLAMA3, default, published
from tests.convert_odd import odd

Config = dict[str, Any]
CASES = int(env.PROOF_CASES.get())
SAMPLE = int(env.PROOF_CASES.default)


@pytest.mark.parametrize("kind", [default, published])
@pytest.mark.parametrize("model_type", DEFAULT)
def test_proof(model_type: str, kind: Callable[[str], Config]) -> None:
    config = kind(model_type)
    proven = prove(config)
    assert proven.passed, proven.lines()
    places, small = [*proven.errors], shrink(config)
    assert places[0] == "embedding"
    each = 4 if model_type == "bert" else 3  # BERT's norm after attention is a place of its own.
    layers = small.get("num_hidden_layers", 4)
    assert sum(place.startswith("layer") for place in places) == each * layers
    depth = small.get("num_nextn_predict_layers", 0)
    assert sum(place.startswith("prediction") for place in places) == 4 * depth
    assert {*proven.outputs} <= {*places}


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
        ("bert", "Bert"),
        ("llama", "Llama"),
        ("qwen2", "Qwen2"),
        ("mistral", "Mistral"),
        ("qwen3_moe", "Qwen3Moe"),
        ("gemma2", "Gemma2"),
        ("glm4", "Glm4"),
    ],
)
def test_proof_of_token_classification(model_type: str, name: str) -> None:
    labels = {str(index): f"L{index}" for index in range(5)}
    config = published(model_type) | {"architectures": [f"{name}ForTokenClassification"]}
    proven = prove(config | {"id2label": labels})
    assert proven.passed, proven.lines()


def test_the_last_tokens_have_nothing_to_predict() -> None:
    """Megatron-LM puts token 0 after the end, of which no compared place may know."""
    change = {"num_nextn_predict_layers": 2, "attention_dropout": 0.25}
    proven = prove(published("deepseek_v3") | change)
    assert proven.outputs == ("logits", "prediction 1 logits", "prediction 2 logits")
    assert proven.passed, proven.lines()
    assert "multi-token prediction of the source is written out here" in proven.note


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
