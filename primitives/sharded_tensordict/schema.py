"""What ranks tell each other about their rows before a tensor travels, and what must agree."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from primitives.collectives import check_same_keys
from primitives.sharded_tensordict.rows import explode, implode

Part = tuple[Any, str]
"""A leaf's key, and which of its dense tensors: "" (itself), or of a jagged one "lengths" and
"values"."""


class Leaf(NamedTuple):
    """What must be equal on all ranks."""

    dtype: torch.dtype
    row_shape: tuple[int, ...]
    requires_grad: bool

    def __str__(self) -> str:
        grad = " with gradient" if self.requires_grad else ""
        return f"{self.dtype} rows of shape {list(self.row_shape)}{grad}"


class Schema(NamedTuple):
    """A rank's rows, without the elements of the tensors."""

    num_rows: int
    leaves: dict[Part, Leaf]
    counts: dict[Part, tuple[int, ...]]
    """rows of each dense tensor: all of them, or by destination"""
    columns: dict[str, list[Any]]
    meta: dict[str, Any]
    sent_rows: tuple[int, ...] = ()
    """rows of the batch by destination, where there are destinations"""


def dense_parts(leaves: Mapping[Any, Tensor]) -> dict[Part, Tensor]:
    """The dense tensors that travel for these leaves."""
    parts: dict[Part, Tensor] = {}
    for key, tensor in leaves.items():
        if tensor.is_nested:
            parts[key, "lengths"], parts[key, "values"] = explode(tensor)
        else:
            parts[key, ""] = tensor
    return parts


def leaves_of(parts: Mapping[Part, Tensor]) -> dict[Any, Tensor]:
    """The leaves of which ``dense_parts`` were made."""
    leaves: dict[Any, Tensor] = {}
    for (key, part), tensor in parts.items():
        if part == "":
            leaves[key] = tensor
        elif part == "lengths":
            leaves[key] = implode(tensor, parts[key, "values"])
    return leaves


def describe(
    num_rows: int,
    parts: Mapping[Part, Tensor],
    columns: Mapping[str, Any],
    meta: dict[str, Any],
    counts: Mapping[Part, Sequence[int]] | None = None,
    sent_rows: tuple[int, ...] = (),
) -> Schema:
    """This rank's schema."""
    grad = torch.is_grad_enabled()
    return Schema(
        num_rows,
        {
            part: Leaf(tensor.dtype, tuple(tensor.shape[1:]), grad and tensor.requires_grad)
            for part, tensor in parts.items()
        },
        {part: tuple(counts[part]) if counts else (len(parts[part]),) for part in parts},
        {name: list(values) for name, values in columns.items()},
        meta,
        sent_rows,
    )


def agree(operation: str, mine: Schema, group: dist.ProcessGroup) -> list[Schema]:
    """The schemas of all ranks, which fit together. One collective of Python values.

    Raises:
        ValueError: keys, dtypes, shapes of a row or wishes for gradients differ; on all ranks
            alike, naming rank, key and both sides.
    """
    schemas: list[Any] = [None] * group.size()
    dist.all_gather_object(schemas, mine, group=group)
    check(operation, schemas)
    return schemas


def check(operation: str, schemas: Sequence[Schema]) -> None:
    """Raises ValueError, naming rank, key and both sides, unless the schemas fit together."""
    keys = [list(dict.fromkeys(key for key, _ in schema.leaves)) for schema in schemas]
    check_same_keys(f"{operation} of tensors", keys)
    check_same_keys(f"{operation} of columns", [list(schema.columns) for schema in schemas])
    first = schemas[0]
    for rank, schema in enumerate(schemas):
        for (key, part), leaf in schema.leaves.items():
            expected = first.leaves.get((key, part))
            if expected is None:
                kinds = ("jagged", "dense") if part else ("dense", "jagged")
                raise ValueError(
                    f"{operation} of tensor {key}: {kinds[0]} on rank {rank}, {kinds[1]} on rank 0"
                )
            if leaf != expected:
                raise ValueError(
                    f"{operation} of tensor {key}: rank {rank} has {leaf}, rank 0 has {expected}"
                )
