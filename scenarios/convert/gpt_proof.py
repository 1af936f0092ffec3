"""Both sides of a decoder's proof: the source's model and megatron-core's GPTModel."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scenarios.convert.build import gpt_model, layer_spec, prediction_spec
from scenarios.convert.heads import LabelHead
from scenarios.convert.latent_core import LatentCoreAttention
from scenarios.convert.megatron import MegatronModel
from scenarios.convert.source_model import SourceModel

MEGATRON_CLASS = "GPTModel"
Values = dict[str, Tensor]
"""Place in the model -> its values, [sequences, tokens, ...]; in the order of the computation."""


@dataclass(frozen=True)
class Inputs:
    """What a decoder reads."""

    tokens: Tensor
    """[sequences, tokens]."""
    positions: Tensor
    """The same shape; a dimension of three in front where a head's parts have their own."""


def random_inputs(model: MegatronModel, tokens: Tensor) -> Inputs:
    """Positions in the sequence; three different ones where time, height and width are apart."""
    line = torch.arange(tokens.shape[1]).expand(tokens.shape)
    if model.transformer.mrope_section is None:
        return Inputs(tokens, line)
    return Inputs(tokens, torch.stack([line, line * 3 % 17, line * 5 % 13]))


def outputs_of(model: MegatronModel) -> tuple[str, ...]:
    """What GPTModel computes: logits, and those of multi-token prediction."""
    depths = range(1, (model.transformer.mtp_num_layers or 0) + 1)
    return ("logits", *(f"prediction {depth} logits" for depth in depths))


def run_source(source: SourceModel, model: MegatronModel, inputs: Inputs) -> Values:
    """Values at every place of the source's model."""
    return source.run(inputs.tokens, inputs.positions)


def run_megatron(built: Any, model: MegatronModel, inputs: Inputs) -> Values:
    """megatron-core's values at the same places."""
    seen: Values = {}

    def note(place: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            value, bias = output if isinstance(output, tuple) else (output, None)
            # Attention and MLP leave their bias to the sum.
            if bias is not None and re.search("attention|mlp", place):
                value = value + bias
            # Megatron-LM has tokens first, and adds the residual in place. Multi-token prediction
            # embeds again.
            seen.setdefault(place, value.transpose(0, 1).clone())

        return hook

    built.embedding.register_forward_hook(note("embedding"))
    for index, layer in enumerate(built.decoder.layers):
        layer.self_attention.register_forward_hook(note(f"layer {index} attention"))
        layer.mlp.register_forward_hook(note(f"layer {index} mlp"))
        layer.register_forward_hook(note(f"layer {index}"))
    built.decoder.final_layernorm.register_forward_hook(note("final norm"))
    predictors = built.mtp.layers if built.mtp_process else ()
    for depth, layer in enumerate(predictors, start=1):
        layer.eh_proj.register_forward_hook(note(f"prediction {depth} input"))
        layer.transformer_layer.register_forward_hook(note(f"prediction {depth} layer"))
        layer.final_layernorm.register_forward_hook(note(f"prediction {depth} norm"))
    logits: list[Tensor] = []
    # The loss, which is computed where there are predictors, writes into the logits.
    built.output_layer.register_forward_hook(lambda *args: logits.append(args[2][0].clone()))
    tokens = inputs.tokens
    built(tokens, inputs.positions, None, labels=tokens if predictors else None)
    *ahead, seen["logits"] = (value.transpose(0, 1) for value in logits)
    for depth, value in enumerate(ahead, start=1):
        seen[f"prediction {depth} logits"] = value
        # The last tokens have none that follow.
        for place in (p for p in seen if p.startswith(f"prediction {depth} ")):
            seen[place] = seen[place][:, : tokens.shape[1] - depth]
    return seen


def build(model: MegatronModel, config: Any) -> Any:
    """megatron-core's GPTModel on its local specification."""
    spec = layer_spec(model, config, use_transformer_engine=False)
    if model.mla is not None:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = LatentCoreAttention
    prediction = prediction_spec(model, config, spec, use_transformer_engine=False)
    built = gpt_model(model, config, spec, mtp_block_spec=prediction)
    if model.head is not None:
        built.output_layer = LabelHead(model.transformer.hidden_size, model.head)
    return built
