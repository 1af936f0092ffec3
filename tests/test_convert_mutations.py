"""Mutations of a conversion that the proof must catch, at the place where they show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from scenarios.convert import convert, mapping, proof
from scenarios.convert.bert_build import bert_norm
from scenarios.convert.build import transformer_config
from scenarios.convert.post_norm import NormThenDropout
from scenarios.convert.proof import prove
from tests.convert_cases import DEEPSEEK_YARN, published

Config = dict[str, Any]


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
    ("bert", {}, {"layernorm_epsilon": 1e-2}, "embedding"),
    ("bert", {}, {"activation_func": "openai_gelu"}, "layer 0 mlp"),
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
    ("qwen3_next", {}, {"rotary_percent": 0.5}, "layer 3 attention"),
    ("qwen3_next", {}, {"moe_router_pre_softmax": True}, "layer 0 mlp"),
    ("qwen3_next", {}, {"layernorm_zero_centered_gamma": False}, "layer 0 attention"),
    ("qwen3_next", {}, {"plain_delta_norm": False}, "layer 0 attention"),
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
        ("glm4_moe", {"mtp_num_layers": 0}, "layers.4"),
        ("bert", {"pooler": False, "binary_head": False}, "pooler.dense"),
        ("bert", {"lm_head": False}, "cls.predictions"),
        ("gemma2", {"post_norms": False}, "post_attention_layernorm.weight"),
        ("glm4", {"post_norms": False}, "post_mlp_layernorm.weight"),
        ("gemma3_text", {"qk_layernorm": False}, "k_norm.weight"),
        ("olmoe", {"all_heads_qk_norm": False}, "k_norm.weight"),
        ("qwen3_next", {"moe_shared_expert_gate": False}, "shared_expert_gate.weight"),
    ],
)
def test_a_missing_part_leaves_tensors_over(model_type: str, wrong: Config, left: str) -> None:
    with pytest.raises(ValueError, match=rf"{left}.*belongs to no parameter"):
        prove(published(model_type), overrides=wrong)


def test_swapped_gate_and_up_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    join = mapping.Stacked.join
    monkeypatch.setattr(mapping.Stacked, "join", lambda self, parts, s: join(self, parts[::-1], s))
    assert prove(published("qwen3")).first_difference == "layer 0 mlp"


@pytest.mark.parametrize(
    ("model_type", "form", "place"),
    [
        ("llama", mapping.QKV, "layer 0 attention"),
        ("qwen3_next", mapping.GatedQKV, "layer 3 attention"),
        ("qwen3_next", mapping.DeltaNetInput, "layer 0 attention"),
    ],
)
def test_heads_that_are_not_kept_in_groups_are_caught(
    model_type: str, form: type, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(form, "join", lambda self, parts, shape: torch.cat(parts))
    assert prove(published(model_type)).first_difference == place


Bend = Callable[[torch.Tensor], torch.Tensor]
BENT: list[tuple[str, str, Bend, str]] = [
    # family, parameter of Megatron, what becomes of it, where it shows
    ("llama", "decoder.layers.2.mlp.linear_fc2.weight", lambda t: t + 0.01, "layer 2 mlp"),
    ("bert", "embedding.tokentype_embeddings.weight", torch.zeros_like, "embedding"),
    ("bert", "embedding.position_embeddings.weight", torch.zeros_like, "embedding"),
    ("bert", "encoder.layers.1.mlp_bda.norm.weight", torch.ones_like, "layer 1"),
    ("bert", "lm_head.layer_norm.weight", torch.ones_like, "lm head"),
    ("bert", "output_layer.bias", torch.zeros_like, "logits"),
    ("bert", "binary_head.bias", torch.zeros_like, "sentence logits"),
    (
        *("deepseek_v3", "mtp.layers.0.eh_proj.weight"),
        *(lambda t: t.roll(t.shape[1] // 2, dims=1), "prediction 1 input"),
    ),
    ("deepseek_v3", "mtp.layers.0.hnorm.weight", torch.ones_like, "prediction 1 input"),
    ("glm4_moe", "mtp.layers.0.enorm.weight", torch.ones_like, "prediction 1 input"),
    (
        *("glm4_moe", "mtp.layers.0.transformer_layer.mlp.router.expert_bias"),
        *(lambda t: t.flip(0), "prediction 1 layer"),
    ),
    ("qwen3_next", "decoder.layers.1.self_attention.A_log", lambda t: t + 1, "layer 1 attention"),
    (
        *("qwen3_next", "decoder.layers.0.self_attention.conv1d.weight"),
        *(lambda t: t.flip(-1), "layer 0 attention"),
    ),
    ("glm4_moe", "mtp.layers.0.final_layernorm.weight", torch.ones_like, "prediction 1 norm"),
]


@pytest.mark.parametrize(("model_type", "name", "bend", "place"), BENT)
def test_a_wrong_parameter_is_caught_at_its_place(
    model_type: str, name: str, bend: Bend, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = proof.HuggingFaceWeights.read

    def bent(self: Any, parameter: Any) -> torch.Tensor:
        tensor = read(self, parameter)
        return bend(tensor) if parameter.name == name else tensor

    monkeypatch.setattr(proof.HuggingFaceWeights, "read", bent)
    assert prove(published(model_type)).first_difference == place


def without_norm(self: Any, embeddings: torch.Tensor) -> torch.Tensor:
    self.norm(embeddings)
    return self.dropout(embeddings)


def norm_before_the_sum(self: Any, training: bool, fused: bool) -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    add = get_bias_dropout_add(training, fused)
    return lambda output, residual, p: add((self.norm(output[0] + output[1]), None), residual, p)


def all_see_padding(self: Any, mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape[0], 1, 1, mask.shape[1], dtype=torch.bool)


def without_tanh(self: Any, states: torch.Tensor, index: int = 0) -> torch.Tensor:
    return self.dense(states[index])


@pytest.mark.parametrize(
    ("where", "instead", "place"),
    [
        ("scenarios.convert.post_norm.NormThenDropout.forward", without_norm, "embedding"),
        (
            *("scenarios.convert.post_norm.SumThenNorm.forward", norm_before_the_sum),
            "layer 0 attention norm",
        ),
        (
            "megatron.core.models.bert.bert_model.BertModel.bert_extended_attention_mask",
            *(all_see_padding, "layer 0 attention"),
        ),
        ("megatron.core.models.bert.pooler.Pooler.forward", without_tanh, "pooled"),
    ],
)
def test_another_bert_is_caught(
    where: str, instead: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, instead)
    assert prove(published("bert")).first_difference == place


def test_berts_embeddings_are_dropped_after_their_norm() -> None:
    """As the source does; LanguageModelEmbedding alone has no norm, and drops the sum."""
    config = transformer_config(convert(published("bert"), overrides={"hidden_dropout": 0.5}))
    module = NormThenDropout(config, bert_norm(use_transformer_engine=False)).train()
    embeddings = torch.randn(5, 2, config.hidden_size)
    torch.manual_seed(0)
    values = module(embeddings)
    kept = values != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(values[kept], 2 * module.norm(embeddings)[kept])
