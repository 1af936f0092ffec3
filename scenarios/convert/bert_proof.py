"""Both sides of BERT's proof: the source's class and megatron-core's BertModel on the same texts.

Texts have all token types, and one of them ends in padding. What stands at padding takes no part
in the comparison: the source masks it as a key only, megatron-core as a query, too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scenarios.convert.bert_build import bert_model
from scenarios.convert.megatron import MegatronModel
from scenarios.convert.source_model import SourceModel

MEGATRON_CLASS = "BertModel"
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """What BERT reads; each [sequences, tokens]."""

    tokens: Tensor
    types: Tensor
    mask: Tensor
    """True: a token, False: padding."""


def random_inputs(model: MegatronModel, tokens: Tensor) -> Texts:
    """Types from torch's generator; the first text fills two thirds of its length."""
    assert model.bert is not None
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 2 * tokens.shape[1] // 3 :] = False
    return Texts(tokens, torch.randint(0, model.bert.num_tokentypes, tokens.shape), mask)


def outputs_of(model: MegatronModel) -> tuple[str, ...]:
    """What BertModel returns, by the heads there are."""
    bert = model.bert
    assert bert is not None
    first = "logits" if bert.lm_head or model.head is not None else "states"
    second = "sentence logits" if bert.binary_head else "pooled"
    return (first, second) if bert.pooler else (first,)


def run_source(source: SourceModel, model: MegatronModel, texts: Texts) -> Values:
    """Values at every place of the source's model, in order: those of tokens [tokens, ...]."""
    assert model.bert is not None
    seen, module = _Seen(texts), source.module
    base = module.base_model
    watched = {"embedding": base.embeddings}
    for index, layer in enumerate(base.encoder.layer):
        watched |= {
            f"layer {index} attention": layer.attention.output.dense,
            f"layer {index} attention norm": layer.attention.output,
            f"layer {index} mlp": layer.output.dense,
            f"layer {index}": layer,
        }
    if model.bert.pooler:
        watched["pooled"] = base.pooler
    if model.bert.lm_head:
        watched["lm head"] = module.cls.predictions.transform
    handles = [part.register_forward_hook(seen.note(name)) for name, part in watched.items()]
    with torch.no_grad():
        outputs = module(
            input_ids=texts.tokens,
            token_type_ids=texts.types,
            attention_mask=texts.mask.long(),
            return_dict=False,
        )
    for handle in handles:
        handle.remove()
    for name, value in zip(outputs_of(model), outputs, strict=True):
        seen.keep(name, value)
    return seen.values


def run_megatron(built: Any, model: MegatronModel, texts: Texts) -> Values:
    """megatron-core's values at the same places."""
    assert model.bert is not None
    seen = _Seen(texts, tokens_first=True)
    built.embedding.register_forward_hook(seen.note("embedding"))
    for index, layer in enumerate(built.encoder.layers):
        layer.self_attention.register_forward_hook(seen.note(f"layer {index} attention"))
        layer.self_attn_bda.norm.register_forward_hook(seen.note(f"layer {index} attention norm"))
        layer.mlp.register_forward_hook(seen.note(f"layer {index} mlp"))
        layer.register_forward_hook(seen.note(f"layer {index}"))
    if model.bert.pooler:
        built.pooler.register_forward_hook(seen.note("pooled"))
    if model.bert.lm_head:
        built.lm_head.register_forward_hook(seen.note("lm head"))
    outputs = built(texts.tokens, texts.mask.long(), tokentype_ids=texts.types)
    for name, value in zip(outputs_of(model), outputs, strict=False):
        seen.keep(name, value)
    return seen.values


def build(model: MegatronModel, config: Any) -> Any:
    """megatron-core's BertModel on its local specification."""
    return bert_model(model, config, use_transformer_engine=False)


class _Seen:
    """Values by place; those of tokens without padding."""

    def __init__(self, texts: Texts, tokens_first: bool = False) -> None:
        self.values: Values = {}
        self._mask = texts.mask
        self._tokens_first = tokens_first

    def keep(self, place: str, value: Tensor) -> None:
        """Take [sequences, tokens, ...], or [sequences, ...] of pooled texts."""
        self.values[place] = (value[self._mask] if value.dim() == 3 else value).clone()

    def note(self, place: str) -> Any:
        """A hook that takes a module's output."""

        def hook(module: Any, inputs: Any, output: Any) -> None:
            value, other = output if isinstance(output, tuple) else (output, None)
            # Attention and MLP of megatron-core leave their bias to the sum.
            if other is not None and place.endswith(("attention", "mlp")):
                value = value + other
            first = self._tokens_first and value.dim() == 3
            self.keep(place, value.transpose(0, 1) if first else value)

        return hook
