"""Tensors as rows: dense ones, [rows, ...], and jagged ones, [rows, any length, ...]."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def even_counts(num_rows: int, num_parts: int) -> list[int]:
    """The rule of every even cut: sizes differ by at most one, the larger ones come first."""
    if num_parts < 1:
        raise ValueError(f"parts: got {num_parts}, expected at least 1")
    size, more = divmod(num_rows, num_parts)
    return [size + 1] * more + [size] * (num_parts - more)


def bounds(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of consecutive runs."""
    ends = list(accumulate(counts))
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def check_layout(key: Any, tensor: Tensor) -> None:
    """Raises ValueError for a tensor whose rows this module cannot take apart."""
    if isinstance(tensor, DTensor):
        raise ValueError(
            f"tensors: {key} is a DTensor; it belongs in replicated, or its local part"
        )
    nested: Any = tensor
    if tensor.is_nested and (tensor.layout is not torch.jagged or nested._ragged_idx != 1):
        raise ValueError(
            f"tensors: {key} is nested with layout {tensor.layout}; expected torch.jagged with "
            "lengths along dimension 1"
        )


def explode(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A jagged tensor -> lengths [rows] int64 and values [sum of lengths, ...]."""
    nested: Any = tensor
    if nested.lengths() is not None:  # a view with holes
        parts = nested.unbind()
        lengths = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        return lengths.to(tensor.device), torch.cat(parts) if parts else nested.values()[:0]
    offsets = nested.offsets()
    return offsets.diff(), nested.values()[int(offsets[0]) : int(offsets[-1])]


def implode(lengths: Tensor, values: Tensor) -> Tensor:
    """The jagged tensor that ``explode`` took apart."""
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    jagged: Tensor = torch.nested.nested_tensor_from_jagged(values, offsets)
    return jagged


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows [rows of index] that an int64 index names; copies."""
    if not tensor.is_nested:
        return tensor[index]
    lengths, values = explode(tensor)
    starts = (lengths.cumsum(0) - lengths)[index]
    taken = lengths[index]
    shift = torch.repeat_interleave(starts - (taken.cumsum(0) - taken), taken)
    return implode(taken, values[shift + torch.arange(len(shift), device=shift.device)])


def cut(tensor: Tensor, start: int, end: int) -> Tensor:
    """The rows from start to end; a view where the tensor is dense."""
    if not tensor.is_nested:
        return tensor[start:end]
    lengths, values = explode(tensor)
    first = int(lengths[:start].sum())
    return implode(lengths[start:end], values[first : first + int(lengths[start:end].sum())])


def join(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, which are all dense or all jagged."""
    if not parts[0].is_nested:
        return torch.cat(list(parts))
    exploded = [explode(part) for part in parts]
    return implode(*(torch.cat(list(tensors)) for tensors in zip(*exploded, strict=True)))
