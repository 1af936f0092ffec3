"""Where the numbers of a Megatron parameter come from: the forms a table of weights is made of.

A form takes the Hugging Face tensors of one Megatron parameter to it (``join``) and back
(``split``); both only move numbers, so a round trip keeps every bit.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Shape(Protocol):
    """What of a model the forms must know."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    linear_key_head_dim: int | None
    linear_value_head_dim: int | None
    linear_num_key_heads: int | None
    linear_num_value_heads: int | None


@dataclass(frozen=True)
class Copy:
    """The tensor itself."""

    source: str

    @property
    def sources(self) -> tuple[str, ...]:
        """Hugging Face names."""
        return (self.source,)

    def join(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """Hugging Face -> Megatron."""
        return tensors[0]

    def split(self, tensor: Tensor, shape: Shape) -> list[Tensor]:
        """Megatron -> Hugging Face."""
        return [tensor]


@dataclass(frozen=True)
class Transposed(Copy):
    """A Conv1D's [in, out] (GPT-2), which is a linear layer's [out, in] transposed."""

    def join(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """Hugging Face -> Megatron."""
        return tensors[0].T

    def split(self, tensor: Tensor, shape: Shape) -> list[Tensor]:
        """Megatron -> Hugging Face."""
        return [tensor.T]


@dataclass(frozen=True)
class Stacked:
    """Rows of several tensors of one size, one after the other: gate and up."""

    sources: tuple[str, ...]

    def join(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """Hugging Face -> Megatron."""
        return torch.cat(tensors)

    def split(self, tensor: Tensor, shape: Shape) -> list[Tensor]:
        """Megatron -> Hugging Face."""
        return list(tensor.chunk(len(self.sources)))


def _in_groups(tensor: Tensor, shape: Shape) -> Tensor:
    """[rows, ...] as [groups, rows of a group, ...]."""
    return tensor.reshape(shape.num_query_groups, -1, *tensor.shape[1:])


@dataclass(frozen=True)
class QKV:
    """Query, key and value; Megatron-LM keeps the heads of a group together.

    Rows of a group: its queries (heads / groups of them), its key, its value, each kv_channels.
    """

    sources: tuple[str, str, str]

    def join(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """Hugging Face -> Megatron."""
        groups = [_in_groups(tensor, shape) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)  # [(heads + 2 groups) * kv_channels, ...]

    def split(self, tensor: Tensor, shape: Shape) -> list[Tensor]:
        """Megatron -> Hugging Face."""
        query = shape.num_attention_heads // shape.num_query_groups * shape.kv_channels
        sizes = [query, shape.kv_channels, shape.kv_channels]
        parts = torch.split(_in_groups(tensor, shape), sizes, dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class GatedQKV(QKV):
    """``QKV`` where each head's query is followed by its gate (Qwen3-Next).

    Rows of a group in Megatron-LM: its queries, their gates, its key, its value.
    """

    def join(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """Hugging Face -> Megatron."""
        query, *others = tensors
        heads = query.reshape(shape.num_query_groups, -1, 2, shape.kv_channels, *query.shape[1:])
        return super().join([heads.transpose(1, 2).reshape(query.shape), *others], shape)

    def split(self, tensor: Tensor, shape: Shape) -> list[Tensor]:
        """Megatron -> Hugging Face."""
        query = 2 * shape.num_attention_heads // shape.num_query_groups * shape.kv_channels
        sizes = [query, shape.kv_channels, shape.kv_channels]
        first, *others = torch.split(_in_groups(tensor, shape), sizes, dim=1)
        heads = first.reshape(len(first), 2, -1, shape.kv_channels, *tensor.shape[1:])
        return [
            heads.transpose(1, 2).flatten(0, 3),
            *(part.flatten(0, 1) for part in others),
        ]


@dataclass(frozen=True)
class DeltaNetInput:
    """Queries, keys, values, gates, betas and alphas of a delta net.

    The source keeps those of a key head together, the first four in one tensor and the last two in
    another; Megatron-LM has all queries first, then all keys, and so on.
    """

    sources: tuple[str, str]

    def join(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """Hugging Face -> Megatron."""
        heads, sizes = _key_heads(shape)
        in_heads = [tensor.reshape(heads, -1, *tensor.shape[1:]) for tensor in tensors]
        parts = torch.split(torch.cat(in_heads, dim=1), sizes, dim=1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def split(self, tensor: Tensor, shape: Shape) -> list[Tensor]:
        """Megatron -> Hugging Face."""
        heads, _ = _key_heads(shape)
        parts = torch.split(tensor, list(delta_net_rows(shape)))
        in_heads = [part.reshape(heads, -1, *tensor.shape[1:]) for part in parts]
        return [torch.cat(some, dim=1).flatten(0, 1) for some in (in_heads[:4], in_heads[4:])]


def delta_net_rows(shape: Shape) -> tuple[int, ...]:
    """Rows of queries, keys, values, gates, betas and alphas of all heads."""
    heads, sizes = _key_heads(shape)
    return tuple(heads * size for size in sizes)


def _key_heads(shape: Shape) -> tuple[int, list[int]]:
    """How many key heads a delta net has, and the same rows of one of them."""
    heads, values = shape.linear_num_key_heads, shape.linear_num_value_heads
    key, value = shape.linear_key_head_dim, shape.linear_value_head_dim
    assert heads is not None
    assert values is not None
    assert key is not None
    assert value is not None
    each = values // heads
    return heads, [key, key, each * value, each * value, each, each]


@dataclass(frozen=True)
class FusedQKV(Copy):
    """Query, key and value in one tensor, one after the other (Phi-3, GPT-2)."""

    transposed: bool = False
    """A Conv1D's [in, out]."""

    def join(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """Hugging Face -> Megatron."""
        rows = tensors[0].T if self.transposed else tensors[0]
        keys = shape.num_query_groups * shape.kv_channels
        sizes = [shape.num_attention_heads * shape.kv_channels, keys, keys]
        parts = torch.split(rows, sizes)
        return _QKV.join(list(parts), shape)

    def split(self, tensor: Tensor, shape: Shape) -> list[Tensor]:
        """Megatron -> Hugging Face."""
        rows = torch.cat(_QKV.split(tensor, shape))
        return [rows.T if self.transposed else rows]


_QKV = QKV(("", "", ""))


@dataclass(frozen=True)
class OfExperts(Copy):
    """One expert's part of a tensor of all experts (gpt-oss); Megatron has a parameter for each.

    The tensor is [experts, in, out] or, for a bias, [experts, out]; ``join`` gets one expert's
    part of it, and ``split`` gives that back.
    """

    interleaved: bool = False
    """Gate and up alternate along ``out``."""

    def join(self, tensors: list[Tensor], shape: Shape) -> Tensor:
        """Hugging Face -> Megatron."""
        part = tensors[0]
        if self.interleaved:
            part = torch.cat([part[..., ::2], part[..., 1::2]], dim=-1)
        return part.T if part.dim() == 2 else part

    def split(self, tensor: Tensor, shape: Shape) -> list[Tensor]:
        """Megatron -> Hugging Face."""
        part = tensor.T if tensor.dim() == 2 else tensor
        if self.interleaved:
            part = torch.stack(part.chunk(2, dim=-1), dim=-1).flatten(-2)
        return [part]


Mapped = Copy | Stacked | QKV | DeltaNetInput
