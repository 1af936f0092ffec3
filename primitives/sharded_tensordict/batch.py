"""Rows of tensors and Python values, and what one process does with them alone."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from primitives.sharded_tensordict.columns import (
    MetaPolicy,
    equal,
    merge_meta,
    object_column,
    same_tensor,
)
from primitives.sharded_tensordict.rows import bounds, check_layout, cut, even_counts, join, take
from primitives.sharded_tensordict.schema import check, dense_parts, describe

PADDING = "padding"
"""Key of the mask [rows] that tells which rows ``pad_to_divisor`` added."""


class Batch:
    """Tensors, object columns, and meta of the whole batch.

    No method changes its batch; results may share memory with it. Jagged tensors (``torch.nested``,
    layout ``torch.jagged``) are tensors with rows like any other.

    Args:
        tensors: batch size [rows]; may be nested.
        columns: name -> one Python value a row (a list or an object array).
        meta: what belongs to the whole batch.

    Raises:
        ValueError: not exactly one batch dimension, a value in ``tensors`` that is no tensor, a
            nested one that is not jagged, or a column of another length.
    """

    def __init__(
        self,
        tensors: TensorDict,
        columns: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        if len(tensors.batch_size) != 1:
            raise ValueError(f"tensors: batch_size must be [rows], got {list(tensors.batch_size)}")
        for key, value in tensors.items(include_nested=True):
            if not isinstance(value, Tensor | TensorDictBase):
                raise ValueError(
                    f"tensors: {key} is a {type(value).__name__}; it belongs in columns or meta"
                )
            if isinstance(value, Tensor):
                check_layout(key, value)
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], meta: Mapping[str, Any] | None = None) -> Self:
        """Tensors and numpy arrays of numbers become tensors, everything else columns."""
        tensors: dict[str, Tensor] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
                tensors[name] = torch.from_numpy(value)
        columns = {name: value for name, value in values.items() if name not in tensors}
        first: Any = next(iter(values.values()), ())
        num_rows = first.size(0) if isinstance(first, Tensor) else len(first)
        return cls(TensorDict(tensors, batch_size=[num_rows]), columns, meta)

    def __len__(self) -> int:
        return int(self.tensors.batch_size[0])

    @property
    def device(self) -> torch.device:
        """Of the tensors; the CPU without any."""
        own = self.tensors.device or next((t.device for t in self.leaves().values()), None)
        return torch.device("cpu") if own is None else own

    def leaves(self) -> dict[Any, Tensor]:
        """Key (a tuple where nested) -> tensor."""
        return dict(self.tensors.items(include_nested=True, leaves_only=True))

    def to(self, device: torch.device | str) -> Self:
        """The same batch on a device."""
        return self._with(self.tensors.to(device), self.columns)

    def __getitem__(self, rows: slice | Tensor | Sequence[Any] | np.ndarray) -> Self:
        """The named rows: a slice, indices, or a mask of bools with one value a row."""
        if isinstance(rows, slice):
            start, end, stride = rows.indices(len(self))
            if stride == 1:
                return self._cut(start, max(start, end))
            index = torch.tensor(range(start, end, stride), dtype=torch.int64)
        else:
            index = torch.as_tensor(rows)
            if not index.numel() and index.dim() == 1:  # an empty list has no dtype
                index = index.to(torch.int64)
        if index.dim() != 1 or index.dtype.is_floating_point or index.dtype.is_complex:
            raise ValueError(
                f"rows: expected a slice, indices or a mask, got {index.dtype} {list(index.shape)}"
            )
        if index.dtype is torch.bool:
            if len(index) != len(self):
                raise ValueError(f"rows: a mask of {len(index)} for {len(self)} rows")
            index = index.nonzero().flatten()
        if len(index) and not (-len(self) <= int(index.min()) <= int(index.max()) < len(self)):
            raise ValueError(f"rows: {index.tolist()} goes beyond the {len(self)} rows")
        index = torch.where(index < 0, index + len(self), index).to(torch.int64)
        taken = {key: take(leaf, index.to(leaf.device)) for key, leaf in self.leaves().items()}
        where = index.numpy()
        columns = {name: values[where] for name, values in self.columns.items()}
        return self._with(self._build(taken, len(index)), columns)

    def row(self, number: int) -> dict[str, Any]:
        """One row: key (nested ones joined by ".") -> tensor, or the column's value."""
        if not -len(self) <= number < len(self):
            raise ValueError(f"row: got {number}, expected one of {len(self)} rows")
        first = number % len(self)
        single = self._cut(first, first + 1)
        tensors = {
            key if isinstance(key, str) else ".".join(key): leaf.unbind()[0]
            for key, leaf in single.leaves().items()
        }
        return tensors | {name: values[0] for name, values in single.columns.items()}

    def select(
        self,
        keys: Collection[Any] | None = None,
        columns: Collection[str] | None = None,
        meta: Collection[str] | None = None,
    ) -> Self:
        """Only these; None keeps all.

        Raises:
            ValueError: one is not there.
        """
        _check_there("tensors", keys or (), self._keys())
        _check_there("columns", columns or (), self.columns)
        _check_there("meta", meta or (), self.meta)
        tensors = self.tensors if keys is None else self.tensors.select(*keys)
        kept = self.columns if columns is None else {name: self.columns[name] for name in columns}
        chosen = self.meta if meta is None else {name: self.meta[name] for name in meta}
        return self._with(tensors, kept, chosen)

    def pop(
        self,
        keys: Collection[Any] = (),
        columns: Collection[str] = (),
        meta: Collection[str] = (),
    ) -> tuple[Self, Self]:
        """A batch of only these, and the batch without them.

        Raises:
            ValueError: one is not there.
        """
        popped = self.select(keys, columns, meta)
        rest = self._with(
            self.tensors.exclude(*keys),
            {name: values for name, values in self.columns.items() if name not in columns},
            {name: value for name, value in self.meta.items() if name not in meta},
        )
        return popped, rest

    def rename(self, names: Mapping[Any, Any]) -> Self:
        """Tensors and columns under other names: old -> new.

        Raises:
            ValueError: an old one is not there, or a new one already is.
        """
        _check_there("rename", names, {*self._keys(), *self.columns})
        taken = ({*self._keys(), *self.columns} - names.keys()) & set(names.values())
        if taken or len(set(names.values())) != len(names):
            raise ValueError(f"rename: {sorted(map(str, taken or names.values()))} would clash")
        tensors = self.tensors.copy()
        moved = {new: tensors.get(old) for old, new in names.items() if old in self._keys()}
        tensors = tensors.exclude(*names)
        for new, value in moved.items():
            tensors[new] = value
        columns = {names.get(name, name): values for name, values in self.columns.items()}
        return self._with(tensors, columns)

    def union(self, other: "Batch", *, meta: MetaPolicy = "equal") -> Self:
        """All tensors and columns of two batches of the same rows; NaN equals NaN.

        Args:
            meta: see ``columns.MetaPolicy``; keys of one side only are kept under "equal", too.

        Raises:
            ValueError: another number of rows, or both have a key with different values.
        """
        if len(other) != len(self):
            raise ValueError(f"union: {len(self)} rows and {len(other)} rows")
        mine, theirs = self.leaves(), other.leaves()
        for key in mine.keys() & theirs.keys():
            parts = [dense_parts({key: leaves[key]}) for leaves in (mine, theirs)]
            if parts[0].keys() != parts[1].keys() or not all(
                same_tensor(parts[0][part], parts[1][part]) for part in parts[0]
            ):
                raise ValueError(f"union of tensor {key}: the two batches have different values")
        for name in self.columns.keys() & other.columns.keys():
            rows = zip(self.columns[name], other.columns[name], strict=True)
            if wrong := [row for row, (a, b) in enumerate(rows) if not equal(a, b)]:
                raise ValueError(f"union of column {name!r}: row {wrong[0]} differs")
        metas = [self.meta, other.meta]
        if meta == "equal":
            common = self.meta.keys() & other.meta.keys()
            merge_meta([{key: m[key] for key in sorted(common)} for m in metas], "equal", "batch")
            merged = self.meta | other.meta
        else:
            merged = merge_meta(metas, meta, "batch")
        return self._with(
            self._build(mine | theirs, len(self)), {**self.columns, **other.columns}, merged
        )

    def chunk(self, num_chunks: int) -> list[Self]:
        """So many batches of consecutive rows; sizes differ by at most one, larger ones first."""
        return [self._cut(*run) for run in bounds(even_counts(len(self), num_chunks))]

    def split(self, num_rows: int) -> list[Self]:
        """Batches of so many consecutive rows; the last one may be shorter."""
        if num_rows < 1:
            raise ValueError(f"split: got {num_rows} rows, expected at least 1")
        starts = range(0, len(self), num_rows)
        return [self._cut(start, min(start + num_rows, len(self))) for start in starts]

    @classmethod
    def concat(cls, batches: Sequence[Self], *, meta: MetaPolicy = "equal") -> Self:
        """The rows of all batches, which have the same keys.

        Raises:
            ValueError: none, other keys, dtypes or shapes, or meta that the policy refuses.
        """
        if not batches:
            raise ValueError("concat: got no batch")
        merged = merge_meta([batch.meta for batch in batches], meta, "batch")
        check(
            "concat",
            [
                describe(len(batch), dense_parts(batch.leaves()), batch.columns, {})
                for batch in batches
            ],
        )
        leaves = [batch.leaves() for batch in batches]
        tensors = {key: join([each[key] for each in leaves]) for key in leaves[0]}
        columns = {
            name: [value for batch in batches for value in batch.columns[name]]
            for name in batches[0].columns
        }
        total = sum(map(len, batches))
        return batches[0]._with(batches[0]._build(tensors, total), columns, merged)

    def repeat(self, times: int | Sequence[int], *, interleave: bool = True) -> Self:
        """Every row so often; interleaved (a, a, b, b) or the whole batch again (a, b, a, b).

        Args:
            times: one number, or one for each row, which is always interleaved.
        """
        counts = torch.as_tensor(times)
        wrong_length = counts.dim() > 1 or (counts.dim() == 1 and len(counts) != len(self))
        if wrong_length or (counts.numel() and (counts.is_floating_point() or counts.min() < 0)):
            raise ValueError(f"repeat: got {times}, expected a number or {len(self)} numbers")
        rows, counts = torch.arange(len(self)), counts.to(torch.int64)
        if counts.dim() == 0 and not interleave:
            return self[rows.repeat(int(counts))]
        return self[torch.repeat_interleave(rows, counts)]

    def reorder(self, order: Tensor | Sequence[int]) -> Self:
        """The rows in another order.

        Raises:
            ValueError: not a permutation of the rows.
        """
        index = torch.as_tensor(order)
        if sorted(index.tolist()) != list(range(len(self))):
            raise ValueError(f"reorder: got {index.tolist()}, expected each of {len(self)} once")
        return self[index]

    def iterate(self, num_rows: int, *, epochs: int = 1, seed: int | None = None) -> Iterator[Self]:
        """Mini-batches of so many rows, the last of an epoch perhaps shorter.

        Args:
            seed: shuffles the rows, anew in each epoch and without torch's global generator.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            rows = self
            if generator is not None:
                rows = self[torch.randperm(len(self), generator=generator)]
            yield from rows.split(num_rows)

    def pad_to_divisor(self, divisor: int) -> Self:
        """Repeats rows from the first on until their number is a multiple of ``divisor``.

        The mask PADDING, a tensor like any other, marks the rows added; it is there even if none
        was, so that the ranks' keys agree.

        Raises:
            ValueError: the divisor is not positive.
        """
        if divisor < 1:
            raise ValueError(f"pad_to_divisor: got {divisor}, expected at least 1")
        num_added = -len(self) % divisor
        padded = self[torch.arange(len(self) + num_added) % max(1, len(self))]
        mask = torch.arange(len(padded)) >= len(self)
        if PADDING in self._keys():
            mask |= padded.tensors[PADDING].cpu()
        tensors = padded.tensors.copy()
        tensors[PADDING] = mask.to(self.device)
        return self._with(tensors, padded.columns)

    def unpad(self) -> Self:
        """Without the rows that ``pad_to_divisor`` added, wherever they are now.

        Raises:
            ValueError: there is no mask.
        """
        _check_there("unpad", [PADDING], self._keys())
        kept = self[~self.tensors[PADDING].cpu()]
        return self._with(kept.tensors.exclude(PADDING), kept.columns)

    def _keys(self) -> set[Any]:
        return set(self.tensors.keys(include_nested=True))

    def _cut(self, start: int, end: int) -> Self:
        leaves = {key: cut(leaf, start, end) for key, leaf in self.leaves().items()}
        columns = {name: values[start:end] for name, values in self.columns.items()}
        return self._with(self._build(leaves, end - start), columns)

    def _build(self, leaves: Mapping[Any, Tensor], num_rows: int) -> TensorDict:
        tensors = TensorDict({}, batch_size=[num_rows], device=self.tensors.device)
        for key, leaf in leaves.items():
            tensors[key] = leaf
        return tensors

    def _with(
        self,
        tensors: TensorDict,
        columns: Mapping[str, Any],
        meta: Mapping[str, Any] | None = None,
    ) -> Self:
        return type(self)(tensors, columns, self.meta if meta is None else meta)


def _check_there(what: str, names: Collection[Any], there: Collection[Any]) -> None:
    if missing := [name for name in names if name not in there]:
        have = ", ".join(sorted(map(str, there)))
        raise ValueError(f"{what}: no {', '.join(map(str, missing))}; have {have}")
