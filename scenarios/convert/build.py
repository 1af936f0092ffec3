"""A converted model as megatron-core's own objects, where megatron-core is installed."""

from typing import TYPE_CHECKING, Any

from scenarios.convert.delta_net import delta_net_block
from scenarios.convert.extra import extend_block, extend_model, zero_center_block
from scenarios.convert.megatron import MegatronModel

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

YARN = "yarn_"
OWN_FORM = frozenset(
    {
        *("activation_func", "moe_layer_freq", "window_attn_skip_freq", "mrope_section"),
        "linear_attention_freq",
    }
)
"""Fields that TransformerConfig takes in another form than the plain one."""


def transformer_config(model: MegatronModel, **settings: Any) -> "TransformerConfig":
    """The model's TransformerConfig, or MLATransformerConfig for latent attention.

    Args:
        model: the converted model.
        settings: further fields of TransformerConfig, of training or of a machine.
    Returns:
        The configuration, which has passed megatron-core's own checks.
    Raises:
        ModuleNotFoundError: megatron-core is not installed.
        ValueError, AssertionError: megatron-core refuses the configuration.
    """
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    fields = model.transformer
    values = {
        name: value
        for name, value in fields.model_dump(exclude_unset=True).items()
        if name not in OWN_FORM and not name.startswith(YARN) and value is not None
    }
    values |= {
        name: list(value)
        for name in OWN_FORM - {"activation_func"}
        if (value := getattr(fields, name)) is not None
    }
    values["mtp_num_layers"] = fields.mtp_num_layers or None
    values["activation_func"] = _activation(fields.activation_func)
    if fields.bf16 or fields.fp16:
        values["params_dtype"] = values["pipeline_dtype"] = _dtype(model)
    elif fields.pipeline_model_parallel_size > 1:
        values["pipeline_dtype"] = _dtype(model)
    kind = TransformerConfig
    if model.mla is not None:
        kind = MLATransformerConfig
        values |= model.mla.model_dump()
    config = kind(**(values | settings))
    for name, value in fields.model_dump().items():
        if name.startswith(YARN) and model.gpt_model.position_embedding_type == "yarn":
            setattr(config, name, value)
    return config


def gpt_model_arguments(model: MegatronModel) -> dict[str, Any]:
    """What GPTModel takes besides the configuration and the layer specification."""
    return {name: v for name, v in model.gpt_model.model_dump().items() if v is not None}


def layer_spec(model: MegatronModel, config: "TransformerConfig", **choices: Any) -> Any:
    """The specification of the layers, with or without Transformer Engine.

    Args:
        model: the converted model.
        config: its ``transformer_config``.
        choices: use_transformer_engine, vp_stage, pp_rank of get_gpt_decoder_block_spec.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    choices.setdefault("use_transformer_engine", True)
    block = get_gpt_decoder_block_spec(
        config, normalization=model.transformer.normalization, **choices
    )
    if config.layernorm_zero_centered_gamma and not choices["use_transformer_engine"]:
        block = zero_center_block(block)
    if model.transformer.linear_attention_freq is not None:
        block = delta_net_block(block, config, **choices)
    return block if model.extra is None else extend_block(block, model.extra)


def gpt_model(
    model: MegatronModel, config: "TransformerConfig", spec: Any, **arguments: Any
) -> Any:
    """The GPTModel, with the extra modules that are no part of its layers.

    Args:
        model: the converted model.
        config: its ``transformer_config``.
        spec: its ``layer_spec``.
        arguments: further arguments of GPTModel: pre_process, post_process, vp_stage.
    """
    from megatron.core.models.gpt import GPTModel

    built = GPTModel(config, spec, **gpt_model_arguments(model), **arguments)
    if model.extra is not None:
        extend_model(built, model.extra)
    return built


def prediction_spec(
    model: MegatronModel, config: "TransformerConfig", spec: Any, **choices: Any
) -> Any:
    """The specification of multi-token prediction, GPTModel's mtp_block_spec; None without it.

    Args:
        model: the converted model.
        config: its ``transformer_config``.
        spec: its ``layer_spec``, of which the last layer is repeated.
        choices: use_transformer_engine, vp_stage, pp_rank of get_gpt_mtp_block_spec.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    if not model.transformer.mtp_num_layers:
        return None
    choices.setdefault("use_transformer_engine", True)
    return get_gpt_mtp_block_spec(config, spec, **choices)


def _activation(name: str) -> Any:
    import torch.nn.functional as F
    from megatron.core.activations import quick_gelu
    from megatron.core.transformer.utils import openai_gelu

    return {"silu": F.silu, "gelu": F.gelu, "openai_gelu": openai_gelu, "quick_gelu": quick_gelu}[
        name
    ]


def _dtype(model: MegatronModel) -> Any:
    import torch

    if model.transformer.bf16:
        return torch.bfloat16
    return torch.float16 if model.transformer.fp16 else torch.float32
