"""Multi-token prediction in torch, for the proof: transformers' classes leave it out.

As the DeepSeek-V3 report defines it (arXiv:2412.19437, section 2.2) and the published checkpoints
hold it, behind the model's own layers: the normed embedding of the following token beside the
normed hidden state, a projection, a layer like the model's last, a norm, and the model's head.
"""

from typing import Any

import torch
from torch import Tensor, nn

NOTE = (
    "multi-token prediction of the source is written out here, around its own layer class: "
    "its model class leaves it out"
)


def add_predictors(module: Any, number: int) -> list[nn.Module]:
    """Put predictors behind the layers of a causal model, where its forward does not run them.

    Args:
        module: a model for causal language modelling, with its layers in ``module.model.layers``.
        number: of predictors.
    Returns:
        The predictors; their parameters have the names of the published checkpoints.
    """
    layers, norm, hidden = module.model.layers, module.model.norm, module.config.hidden_size
    epsilon = module.config.rms_norm_eps
    predictors: list[nn.Module] = []
    for index in range(len(layers), len(layers) + number):
        predictor = type(layers[-1])(module.config, layer_idx=index)
        predictor.enorm = type(norm)(hidden, eps=epsilon)
        predictor.hnorm = type(norm)(hidden, eps=epsilon)
        predictor.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        predictor.shared_head = nn.ModuleDict({"norm": type(norm)(hidden, eps=epsilon)})
        predictors.append(predictor.train(module.training))
    layers.extend(predictors)
    return predictors


def run_predictors(
    module: Any, predictors: list[nn.Module], tokens: Tensor, states: Tensor
) -> dict[str, Tensor]:
    """Values at the places of multi-token prediction, in order.

    Args:
        module: the model.
        predictors: its predictors, each of which takes the normed states of the one before.
        tokens: [sequences, tokens].
        states: hidden states after the final norm, [sequences, tokens, hidden].
    Returns:
        [sequences, tokens - depth, ...] for the predictor of that depth, counted from 1.
    """
    model = module.model
    seen: dict[str, Tensor] = {}
    for depth, predictor in enumerate(predictors, start=1):
        layer: Any = predictor
        following = model.embed_tokens(tokens[:, depth:])
        states = states[:, :-1]
        joined = torch.cat([layer.enorm(following), layer.hnorm(states)], dim=-1)
        projected = layer.eh_proj(joined)  # [sequences, tokens - depth, hidden]
        number = projected.shape[1]
        positions = torch.arange(number)[None]
        later = torch.full((number, number), float("-inf")).triu(1)[None, None]
        output = layer(
            projected,
            attention_mask=later,
            position_ids=positions,
            position_embeddings=model.rotary_emb(projected, position_ids=positions),
        )
        states = layer.shared_head["norm"](output)
        seen |= {
            f"prediction {depth} input": projected,
            f"prediction {depth} layer": output,
            f"prediction {depth} norm": states,
            f"prediction {depth} logits": module.lm_head(states),
        }
    return seen
