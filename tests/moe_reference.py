"""A GPT with experts in plain PyTorch, which knows nothing of canonical parts or dispatch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scenarios.scenario import ModelConfig

Parameters = dict[str, torch.nn.Parameter]


def losses(
    config: ModelConfig, parameters: Parameters, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Mean cross entropy of one microbatch [samples, length], and each layer's balance loss."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    samples, length = tokens.shape
    words = parameters["embedding.word_embeddings.weight"]
    x = words[tokens] + parameters["embedding.position_embeddings.weight"][:length]
    balance = []
    for layer in range(config.num_layers):
        weights = {
            name.removeprefix(f"decoder.layers.{layer}."): value
            for name, value in parameters.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        y = _norm(config, x, weights, "input_layernorm")
        qkv = y @ weights["self_attention.linear_qkv.weight"].t()
        q, k, v = qkv.view(samples, length, heads, 3, hidden // heads).permute(3, 0, 2, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        context = context.transpose(1, 2).reshape(samples, length, hidden)
        x = x + context @ weights["self_attention.linear_proj.weight"].t()
        y = _norm(config, x, weights, "pre_mlp_layernorm").flatten(0, 1)
        routed, loss = experts(config, y, weights)
        x = x + routed.view_as(x)
        balance.append(loss)
    x = _norm(config, x, parameters, "decoder.final_layernorm")
    return F.cross_entropy((x @ words.t()).flatten(0, 1), labels.flatten()), balance


def experts(config: ModelConfig, x: Tensor, weights: Parameters) -> tuple[Tensor, Tensor]:
    """[tokens, h] -> [tokens, h], and the balance loss without its coefficient."""
    moe = config.moe
    assert moe is not None
    logits = x @ weights["mlp.router.weight"].t()
    top, chosen = logits.topk(moe.router_topk)
    gates = torch.zeros_like(logits).scatter(1, chosen, top.softmax(dim=-1))
    y = _mlp(x, weights, "mlp.shared_experts", "")
    for expert in range(moe.num_experts):
        y = y + gates[:, expert, None] * _mlp(x, weights, "mlp.experts", str(expert))
    share = (gates != 0).float().mean(dim=0) / moe.router_topk
    return y, moe.num_experts * (share * logits.softmax(dim=-1).mean(dim=0)).sum()


def _norm(config: ModelConfig, x: Tensor, weights: Parameters, name: str) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return F.layer_norm(x, (config.hidden_size,), weight, bias, config.layernorm_epsilon)


def _mlp(x: Tensor, weights: Parameters, name: str, number: str) -> Tensor:
    y = F.gelu(x @ weights[f"{name}.linear_fc1.weight{number}"].t())
    return y @ weights[f"{name}.linear_fc2.weight{number}"].t()
