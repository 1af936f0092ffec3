"""Modules of ours in a GPTModel: where the output says, right by themselves, caught if wrong."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm, GemmaTextScaledWordEmbedding

from scenarios.convert import MegatronModel, ParallelLayout, convert, gpt_proof, proof
from scenarios.convert.build import gpt_model, layer_spec, transformer_config
from scenarios.convert.extra import listing
from scenarios.convert.flags import flags, plain, words
from scenarios.convert.megatron_on_cpu import megatron_on_cpu
from scenarios.convert.proof import prove
from scenarios.convert.shrink import shrink
from tests.convert_cases import DEFAULT, published

EXTRA = [name for name in DEFAULT if convert(published(name)).extra is not None]
NEEDED = {
    "gemma": {"ScaledEmbedding"},
    "gemma2": {"ScaledEmbedding", "NormAfter", "SoftCappedAttention", "SoftCappedOutputLayer"},
    **dict.fromkeys(
        ("gemma3_text", "gemma3"),
        frozenset(("ScaledEmbedding", "NormAfter", "GlobalAndLocalRotary", "LocalRotaryAttention")),
    ),
    "glm4": {"NormAfter"},
    "olmoe": {"AllHeadsRMSNorm"},
    "qwen3_next": {"PlainRMSNorm"},
}


def built(model: MegatronModel, **arguments: Any) -> Any:
    """The GPTModel of megatron-core's local modules and ours, on the CPU."""
    config = transformer_config(model, use_cpu_initialization=True)
    spec = layer_spec(model, config, use_transformer_engine=False)
    return gpt_model(model, config, spec, **arguments)


def test_what_the_output_names_is_what_the_model_has() -> None:
    assert set(EXTRA) == set(NEEDED)
    assert "extra_modules" not in plain(convert(published("llama")))
    for model_type in EXTRA:
        model = convert(shrink(published(model_type)))
        named = plain(model)["extra_modules"]
        assert named == listing(model)
        classes = []
        for row in named:
            module, _, name = row["module"].rpartition(".")
            classes.append(getattr(importlib.import_module(module), name))
        assert {kind.__name__ for kind in classes} == NEEDED[model_type]
        with megatron_on_cpu():
            modules = list(built(model).modules())
        for row, kind in zip(named, classes, strict=True):
            count = sum(isinstance(module, kind) for module in modules)
            layers = model.transformer.num_layers
            if "delta net" in row["place"]:
                layers = sum(model.transformer.linear_attention_freq or ())
            expected = 1 if "GPTModel" in row["place"] else layers * (1 + (" and " in row["place"]))
            assert count == expected, row


def test_a_pipeline_stage_has_its_part_of_them() -> None:
    model = convert(shrink(published("gemma2")))
    with megatron_on_cpu():
        last = built(model, pre_process=False)
        first = built(model, post_process=False)
    assert type(last.output_layer).__name__ == "SoftCappedOutputLayer"
    assert not hasattr(last, "embedding")
    assert type(first.embedding).__name__ == "ScaledEmbedding"
    assert not hasattr(first, "output_layer")


def test_a_pipeline_stage_has_its_delta_nets() -> None:
    """Of four layers the last has attention; the second of two stages begins with the third."""
    model = convert(shrink(published("qwen3_next")), layout=ParallelLayout(pp=2))
    config = transformer_config(model, use_cpu_initialization=True)
    for stage, expected in enumerate((["GatedDeltaNet"] * 2, ["GatedDeltaNet", "SelfAttention"])):
        block = layer_spec(model, config, use_transformer_engine=False, pp_rank=stage)
        kinds = [layer.submodules.self_attention.module.__name__ for layer in block.layer_specs]
        assert kinds == expected


def test_embeddings_are_scaled_with_the_bits_of_the_source() -> None:
    """sqrt(3072) = 55.43 is 55.5 in bfloat16, and it is that which embeddings are multiplied by."""
    config = shrink(published("gemma")) | {"dtype": "bfloat16", "hidden_size": 3072}
    source = GemmaTextScaledWordEmbedding(16, 3072, 0, embed_scale=3072**0.5).bfloat16()
    tokens = torch.arange(16)[None]
    with megatron_on_cpu(), torch.no_grad():
        embedding = built(convert(config | {"vocab_size": 16}), post_process=False).embedding
        embedding.word_embeddings.weight.copy_(source.weight)
        actual = embedding(tokens, tokens)
        expected = source(tokens)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual.transpose(0, 1), expected)
    unrounded = (source.weight.float() * 3072**0.5).bfloat16()
    assert not torch.equal(expected[0], unrounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_around_one_have_the_bits_of_the_source(dtype: torch.dtype) -> None:
    from scenarios.convert.extra_modules import ZeroCenteredRMSNorm

    model = convert(published("gemma"))
    norm = ZeroCenteredRMSNorm(transformer_config(model), 96, 1e-6)
    source = GemmaRMSNorm(96, 1e-6)
    with torch.no_grad():
        source.weight.copy_(torch.randn(96))
        norm.weight.copy_(source.weight)
    states = torch.randn(5, 96).to(dtype)
    assert torch.equal(norm(states), source(states))


def without_norm(self: Any, inputs: Tensor) -> tuple[Tensor, None]:
    """A linear whose norm was forgotten."""
    return super(type(self).__mro__[1], self).forward(inputs)[0], None


def of_each_head(self: Any, states: Tensor) -> Tensor:
    """A norm of each head alone, as megatron-core's qk_layernorm is one."""
    normed = nn.functional.rms_norm(states, states.shape[-1:], eps=self.eps)
    return normed * self.weight.view(states.shape[-2:])


MUTATIONS: list[tuple[str, str, str, Any, str]] = [
    ("gemma2", "extra_modules.NormAfter", "forward", without_norm, "layer 0 attention"),
    ("glm4", "extra_modules.NormAfter", "forward", without_norm, "layer 0 attention"),
    ("olmoe", "extra_attention.AllHeadsRMSNorm", "forward", of_each_head, "layer 0 attention"),
]


@pytest.mark.parametrize(("model_type", "where", "name", "wrong", "place"), MUTATIONS)
def test_a_wrong_module_is_caught(
    model_type: str,
    where: str,
    name: str,
    wrong: Callable[..., Any],
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, _, kind = where.partition(".")
    owner = getattr(importlib.import_module(f"scenarios.convert.{module}"), kind)
    monkeypatch.setattr(owner, name, wrong)
    proven = prove(published(model_type))
    assert not proven.passed
    assert proven.first_difference == place
    assert proven.errors[place] > 10 * proof.TOLERANCE


def test_the_proof_says_what_is_ours() -> None:
    lines = "\n".join(prove(published("gemma3_text")).lines())
    assert "ours: ScaledEmbedding, NormAfter, GlobalAndLocalRotary, " in lines
    assert "norms with 1 + weight are written out here" in lines


@pytest.mark.parametrize(
    ("model_type", "name"), [("glm4", "post_norms"), ("olmoe", "all_heads_qk_norm_moe")]
)
def test_the_layer_that_the_flags_name(
    model_type: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-LM imports the object that --spec names and gives it to GPTModel as it is."""
    given = flags(convert(published(model_type)))
    assert given["--spec"] == ("scenarios.convert.layer_specs", name)
    assert f"--spec scenarios.convert.layer_specs {name}" in " ".join(words(given))
    used = []

    def named(*_: Any, **__: Any) -> Any:
        from megatron.core.transformer.spec_utils import import_module

        used.append(import_module(given["--spec"]))
        return used[0]

    monkeypatch.setattr(gpt_proof, "layer_spec", named)
    assert prove(published(model_type)).passed
    assert len(used) == 1


def test_what_no_flag_says_is_refused() -> None:
    for model_type in ("gemma", "gemma2", "gemma3", "gemma3_text", "qwen3_next"):
        with pytest.raises(ValueError, match=r"extra modules \w+.*use build.gpt_model"):
            flags(convert(published(model_type)))
    scaled = convert(published("llama"), overrides={"softmax_scale": 0.1})
    with pytest.raises(ValueError, match=r"softmax_scale: got 0\.1, which has no flag"):
        flags(scaled)


def test_modules_without_context_parallelism() -> None:
    with pytest.raises(ValueError, match="cp: got 2, expected 1: capped scores"):
        convert(published("gemma2"), layout=ParallelLayout(cp=2))
    with pytest.raises(ValueError, match="cp: got 2, expected 1: megatron-core's GatedDeltaNet"):
        convert(published("qwen3_next"), layout=ParallelLayout(cp=2))
    assert convert(published("gemma3"), layout=ParallelLayout(cp=2)).extra is not None


def test_settings_that_the_modules_cannot_have() -> None:
    from scenarios.convert.extra_attention import SoftCappedAttention

    model = convert(shrink(published("glm4")), overrides={"add_bias_linear": True})
    with megatron_on_cpu(), pytest.raises(ValueError, match="beside norms after linears"):
        built(model)
    with megatron_on_cpu():
        config = transformer_config(
            convert(shrink(published("gemma2"))),
            apply_query_key_layer_scaling=True,
            attention_softmax_in_fp32=True,
        )
        with pytest.raises(ValueError, match="apply_query_key_layer_scaling: got True"):
            SoftCappedAttention(config, 1, None, "self", softcap=2.0)
        attention = (
            built(convert(shrink(published("gemma3_text")))).decoder.layers[0].self_attention
        )
        with pytest.raises(ValueError, match="rotary_pos_emb: got None"):
            attention(torch.zeros(3, 1, 64), None)
