"""Layouts: what divides a model, which layers a stage has, and megatron-core's own checks."""

import pytest
import torch

from scenarios.convert import ParallelLayout, convert
from scenarios.convert.build import transformer_config
from tests.convert_cases import DEFAULT, published

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


@pytest.mark.parametrize(
    "text",
    ["tp2,sp", "pp4", "pp4,first5,last3", "pp2,vpp2", "pp4,vpp2,first4,last4", "tp2,pp2,sp,cp2"],
)
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
