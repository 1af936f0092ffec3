"""A state seen as keys, plain values and boxes of global tensors.

A box is the part of a global tensor that one rank holds: its offset in every dimension and its
shape. A plain tensor is one box that covers everything.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.checkpoint.utils import find_tensor_shard

from primitives.checkpoint.plain_values import encode
from primitives.checkpoint.shard_file import DTYPE_NAMES


class Box(NamedTuple):
    """A part of a global tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def overlap(self, other: "Box") -> "Box | None":
        """The common part of two boxes of one tensor, or None."""
        starts = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        ]
        shape = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(tuple(starts), shape) if all(n > 0 for n in shape) else None

    def slices_within(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box lies inside an outer one."""
        return tuple(
            slice(start - base, start - base + n)
            for start, base, n in zip(self.offset, outer.offset, self.shape, strict=True)
        )


class TensorKind(NamedTuple):
    """What all ranks must agree on about a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class LocalTensor:
    """The boxes of one key that this rank holds, with their data."""

    kind: TensorKind
    boxes: dict[Box, torch.Tensor]


@dataclass
class LocalState:
    """This rank's state, flattened to keys."""

    tensors: dict[str, LocalTensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """key -> plain value as ``encode`` gives it"""


class Leaf(NamedTuple):
    """One entry of a nested state."""

    key: str
    value: Any
    put: Callable[[Any], None]
    """replaces the entry in its dict"""


def leaves(state: dict[str, Any], prefix: str = "") -> Iterator[Leaf]:
    """The entries of a nested dict in order; key parts are joined by "/" (escaped as RFC 6901).

    Raises:
        ValueError: a dict key is not a string.
    """
    for name, value in list(state.items()):
        if not isinstance(name, str):
            raise ValueError(f"checkpoint state under {prefix!r}: key {name!r} is not a string")
        key = prefix + name.replace("~", "~0").replace("/", "~1")
        if isinstance(value, dict):
            yield from leaves(value, key + "/")
        else:
            yield Leaf(key, value, partial(state.__setitem__, name))


@torch.no_grad()
def local_tensor(key: str, tensor: torch.Tensor) -> LocalTensor:
    """The boxes of a tensor, DTensor or ShardedTensor; their data shares its memory.

    Raises:
        ValueError: a dtype or layout that checkpoints cannot hold.
    """
    if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
        raise ValueError(
            f"checkpoint key {key!r}: cannot store {tensor.dtype}, {tensor.layout}; "
            f"expected a dense tensor of {', '.join(DTYPE_NAMES.values())}"
        )
    kind = TensorKind(DTYPE_NAMES[tensor.dtype], tuple(tensor.size()))
    boxes = {}
    for chunk in _create_chunk_list(tensor):
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        if box.numel:
            shard = find_tensor_shard(tensor, MetadataIndex(key, chunk.offsets))
            boxes[box] = shard.detach()
    return LocalTensor(kind, boxes)


def collect(state: dict[str, Any]) -> LocalState:
    """This rank's state as keys; the data shares the state's memory.

    Args:
        state: nested dict of tensors and plain values.

    Raises:
        ValueError: an entry that cannot be stored.
    """
    local = LocalState()
    for key, value, _ in leaves(state):
        if isinstance(value, torch.Tensor):
            local.tensors[key] = local_tensor(key, value)
        else:
            local.values[key] = encode(value, key)
    return local


class Plan(NamedTuple):
    """Who writes what."""

    kinds: dict[str, TensorKind]
    writers: dict[tuple[str, Box], int]
    copies: dict[tuple[str, Box], list[int]]
    """boxes that several ranks hold, with those ranks"""
    values: dict[str, Any]


Outline = tuple[dict[str, tuple[TensorKind, list[Box]]], dict[str, Any]]


def outline(local: LocalState) -> Outline:
    """What a rank tells the others about its state: everything but the data."""
    tensors = {key: (entry.kind, list(entry.boxes)) for key, entry in local.tensors.items()}
    return tensors, local.values


def make_plan(outlines: list[Outline]) -> Plan:
    """Merges the outlines of all ranks; every rank computes the same plan.

    Raises:
        ValueError: ranks contradict each other about a key, or its boxes do not cover the tensor.
    """
    kinds: dict[str, TensorKind] = {}
    values: dict[str, Any] = {}
    holders: dict[str, dict[Box, list[int]]] = {}
    for rank, (tensors, plain) in enumerate(outlines):
        for key, (kind, boxes) in tensors.items():
            if kinds.setdefault(key, kind) != kind:
                raise ValueError(
                    f"checkpoint key {key!r}: {kind.dtype} {list(kind.shape)} on rank {rank}, "
                    f"{kinds[key].dtype} {list(kinds[key].shape)} on a lower rank"
                )
            for box in boxes:
                holders.setdefault(key, {}).setdefault(box, []).append(rank)
        for key, value in plain.items():
            # As text, because True == 1 == 1.0 and 0.0 == -0.0.
            if repr(values.setdefault(key, value)) != repr(value):
                raise ValueError(
                    f"checkpoint key {key!r}: {value!r} on rank {rank}, {values[key]!r} on a "
                    "lower rank; values that differ need a key for each rank"
                )
    for key in sorted(kinds):
        if key in values:
            raise ValueError(f"checkpoint key {key!r}: a tensor on one rank, a value on another")
        held = sum(box.numel for box in holders.get(key, {}))
        if held != prod(kinds[key].shape):
            raise ValueError(
                f"checkpoint key {key!r}: the ranks hold {held} different elements of a tensor "
                f"of shape {list(kinds[key].shape)}; shards overlap or are missing"
            )
    return Plan(kinds, *_choose_writers(holders, len(outlines)), values)


def _choose_writers(
    holders: dict[str, dict[Box, list[int]]], world_size: int
) -> tuple[dict[tuple[str, Box], int], dict[tuple[str, Box], list[int]]]:
    writers, copies = {}, {}
    written = [0] * world_size
    for key in sorted(holders):
        for box, ranks in sorted(holders[key].items()):
            writer = min(ranks, key=lambda rank: written[rank])
            written[writer] += box.numel
            writers[key, box] = writer
            if len(ranks) > 1:
                copies[key, box] = ranks
    return writers, copies
