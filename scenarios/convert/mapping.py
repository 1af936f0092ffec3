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


Mapped = Copy | Stacked | QKV
