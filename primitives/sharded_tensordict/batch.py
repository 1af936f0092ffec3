"""A batch whose rows are spread over the ranks of a mesh dimension.

Tensors lie in a ``tensordict.TensorDict``, other values of a row in object columns, what belongs to
the whole batch in ``meta``.
"""

import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch.distributed.device_mesh import DeviceMesh

from primitives.collectives import check_same_keys

ALIGNMENT_NBYTES = 16  # each tensor starts where any dtype may start


class _Leaf(NamedTuple):
    """What another rank must know to read a tensor: all but the number of rows is equal."""

    dtype: torch.dtype
    row_shape: tuple[int, ...]

    def nbytes(self, num_rows: int) -> int:
        numel = num_rows
        for length in self.row_shape:
            numel *= length
        return numel * self.dtype.itemsize

    def stride_nbytes(self, num_rows: int) -> int:
        return -(-self.nbytes(num_rows) // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES


class _Shard(NamedTuple):
    """What a rank tells the others about its rows before the tensors travel."""

    num_rows: int
    leaves: dict[Any, _Leaf]
    columns: dict[str, list[Any]]
    meta: dict[str, Any]


class ShardedTensorDict:
    """This rank's rows: tensors, object columns, and meta equal on all ranks."""

    def __init__(
        self,
        tensors: TensorDict,
        columns: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks that everything has the same number of rows.

        Args:
            tensors: batch size [rows]; may be nested.
            columns: name -> one Python value a row (a list or an object array).
            meta: what belongs to the whole batch.

        Raises:
            ValueError: not exactly one batch dimension, a value in ``tensors`` that is no tensor,
                or a column of another length.
        """
        if len(tensors.batch_size) != 1:
            raise ValueError(f"tensors: batch_size must be [rows], got {list(tensors.batch_size)}")
        for key, value in tensors.items(include_nested=True):
            if not isinstance(value, torch.Tensor | TensorDictBase):
                raise ValueError(
                    f"tensors: {key} is a {type(value).__name__}; it belongs in columns or meta"
                )
        self.tensors = tensors
        self.columns: dict[str, np.ndarray] = {}
        self.meta = dict(meta or {})
        for name, values in (columns or {}).items():
            if len(values) != len(self):
                raise ValueError(
                    f"column {name!r}: one value a row is needed: "
                    f"got {len(values)} values for {len(self)} rows"
                )
            self.columns[name] = object_column(list(values))

    def __len__(self) -> int:
        return int(self.tensors.batch_size[0])

    def all_gather(self, mesh: DeviceMesh, mesh_dim: str) -> "ShardedTensorDict":
        """The rows of all ranks of a mesh dimension, in rank order, on each of them.

        Two collectives, whatever the number of tensors: one that tells rows, columns and meta, and
        one that carries the bytes of all tensors.

        Args:
            mesh: the mesh this rank belongs to.
            mesh_dim: the name of the dimension over which the rows are spread.

        Returns:
            A new batch; its tensors share no memory with this one. Ranks may bring different
            numbers of rows, also none.

        Raises:
            ValueError: keys, dtypes, shapes of a row or meta differ; raised on all ranks alike.

        Numerics:
            Bytes are copied: every value arrives with the same bits, NaNs too.
        """
        group = mesh.get_group(mesh_dim)
        tensors = dict(self.tensors.items(include_nested=True, leaves_only=True))
        leaves = {key: _Leaf(t.dtype, tuple(t.shape[1:])) for key, t in tensors.items()}
        columns = {name: list(values) for name, values in self.columns.items()}
        shards: list[Any] = [None] * group.size()
        mine = _Shard(len(self), leaves, columns, self.meta)
        dist.all_gather_object(shards, mine, group=group)
        check_shards(shards)

        device = self.tensors.device or next((t.device for t in tensors.values()), None)
        shard_nbytes = [
            sum(leaf.stride_nbytes(s.num_rows) for leaf in leaves.values()) for s in shards
        ]
        nbytes = max(ALIGNMENT_NBYTES, *shard_nbytes)  # no rows at all are no special case
        packed = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        offset = 0
        for key, leaf in leaves.items():
            size = leaf.nbytes(len(self))
            packed[offset : offset + size] = tensors[key].contiguous().reshape(-1).view(torch.uint8)
            offset += leaf.stride_nbytes(len(self))
        full = [torch.empty_like(packed) for _ in shards]
        dist.all_gather(full, packed, group=group)

        parts: dict[Any, list[torch.Tensor]] = {key: [] for key in leaves}
        for shard, data in zip(shards, full, strict=True):
            offset = 0
            for key, leaf in shard.leaves.items():  # in the order in which that rank packed them
                flat = data[offset : offset + leaf.nbytes(shard.num_rows)].view(leaf.dtype)
                parts[key].append(flat.reshape(shard.num_rows, *leaf.row_shape))
                offset += leaf.stride_nbytes(shard.num_rows)
        gathered = TensorDict({}, batch_size=[sum(s.num_rows for s in shards)], device=device)
        for key, rows in parts.items():
            gathered[key] = torch.cat(rows)
        return ShardedTensorDict(
            gathered,
            {name: [v for s in shards for v in s.columns[name]] for name in columns},
            self.meta,
        )


def object_column(values: list[Any]) -> np.ndarray:
    """A one-dimensional object array, also of values that numpy would take apart."""
    column = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = value
    return column


def check_shards(shards: list[_Shard]) -> None:
    """Raises ValueError, naming rank and key, unless the shards fit together."""
    check_same_keys("all_gather of tensors", [list(s.leaves) for s in shards])
    check_same_keys("all_gather of columns", [list(s.columns) for s in shards])
    check_same_keys("all_gather of meta", [list(s.meta) for s in shards])
    first = shards[0]
    for rank, shard in enumerate(shards):
        for key, leaf in shard.leaves.items():
            if leaf != first.leaves[key]:
                raise ValueError(
                    f"all_gather of tensor {key}: rank {rank} has {leaf.dtype} rows of shape "
                    f"{list(leaf.row_shape)}, rank 0 has {first.leaves[key].dtype} rows of shape "
                    f"{list(first.leaves[key].row_shape)}"
                )
        for key, value in shard.meta.items():
            if not equal(value, first.meta[key]):
                raise ValueError(
                    f"all_gather of meta {key}: rank {rank} has {value!r}, "
                    f"rank 0 has {first.meta[key]!r}"
                )


def equal(a: Any, b: Any) -> bool:
    """By bits where possible (so NaN equals NaN), else by value; nothing is broadcast."""
    if pickle.dumps(a) == pickle.dumps(b):
        return True
    same_shape: bool = getattr(a, "shape", None) == getattr(b, "shape", None)
    return same_shape and bool(np.all(a == b))
