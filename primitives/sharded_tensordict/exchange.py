"""Rows between the ranks of a group: first the schema, then all tensors in one collective."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from primitives.sharded_tensordict import transport
from primitives.sharded_tensordict.columns import MetaPolicy, merge_meta
from primitives.sharded_tensordict.rows import bounds, even_counts
from primitives.sharded_tensordict.schema import (
    Part,
    Schema,
    agree,
    dense_parts,
    describe,
    leaves_of,
)

if TYPE_CHECKING:
    from primitives.sharded_tensordict.batch import Batch

REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


class Rows(NamedTuple):
    """The result of an exchange, of which a batch is made."""

    num_rows: int
    leaves: dict[Any, Tensor]
    columns: dict[str, list[Any]]
    meta: dict[str, Any]


T = TypeVar("T")


class Handle(Generic[T]):
    """An exchange under way; the tensors given to it must not change before it is waited for."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish
        self._result: T | None = None

    def wait(self) -> T:
        """The result; the same one each time."""
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        assert self._result is not None
        return self._result


Exchange = Callable[[], Rows]


def all_gather(batch: "Batch", group: dist.ProcessGroup, policy: MetaPolicy) -> Exchange:
    """Starts an all_gather; the result waits."""
    parts = dense_parts(batch.leaves())
    mine = describe(len(batch), parts, batch.columns, batch.meta)
    schemas = agree("all_gather", mine, group)
    meta = merge_meta([schema.meta for schema in schemas], policy, "rank")
    counts = {part: [schema.counts[part][0] for schema in schemas] for part in mine.leaves}
    finish = _with_gradients(
        transport.GatherRows,
        lambda tensors, sizes: transport.gather(tensors, sizes, group, batch.device),
        parts,
        schemas[0],
        counts,
        group,
    )

    def result() -> Rows:
        columns = {name: [v for s in schemas for v in s.columns[name]] for name in mine.columns}
        total = sum(schema.num_rows for schema in schemas)
        return Rows(total, leaves_of(finish()), columns, meta)

    return result


def reduce_scatter(
    batch: "Batch", group: dist.ProcessGroup, op: str, policy: MetaPolicy
) -> Exchange:
    """Starts a reduce_scatter; the result waits."""
    if op not in REDUCE_OPS:
        raise ValueError(f"reduce_scatter: op {op!r}, expected one of {', '.join(REDUCE_OPS)}")
    parts = dense_parts(batch.leaves())
    mine = describe(len(batch), parts, batch.columns, batch.meta)
    schemas = agree("reduce_scatter", mine, group)
    for rank, schema in enumerate(schemas):
        if schema.num_rows != schemas[0].num_rows:
            raise ValueError(
                f"reduce_scatter: rank {rank} has {schema.num_rows} rows, rank 0 has "
                f"{schemas[0].num_rows}; all ranks bring the full batch"
            )
    for (key, part), leaf in mine.leaves.items():
        if part:
            raise ValueError(f"reduce_scatter of tensor {key}: jagged rows have no sum")
        if leaf.requires_grad and op != "sum":
            raise ValueError(f"reduce_scatter of tensor {key}: {op} has no gradient, sum has")
    columns = merge_meta([schema.columns for schema in schemas], "equal", "columns of rank")
    meta = merge_meta([schema.meta for schema in schemas], policy, "rank")
    sizes = even_counts(len(batch), group.size())
    finish = _with_gradients(
        transport.ReduceRows,
        lambda tensors, counts: transport.reduce_rows(tensors, counts, group, REDUCE_OPS[op]),
        parts,
        schemas[0],
        dict.fromkeys(mine.leaves, sizes),
        group,
    )
    start, end = bounds(sizes)[group.rank()]

    def result() -> Rows:
        own = {name: values[start:end] for name, values in columns.items()}
        return Rows(end - start, leaves_of(finish()), own, meta)

    return result


def all_to_all(
    batch: "Batch",
    num_rows: Sequence[int],
    group: dist.ProcessGroup,
    policy: MetaPolicy,
) -> Exchange:
    """Starts an all_to_all; the result waits."""
    if len(num_rows) != group.size() or min(num_rows) < 0 or sum(num_rows) != len(batch):
        raise ValueError(
            f"all_to_all: got {list(num_rows)} rows for the ranks, expected {group.size()} numbers "
            f"of at least 0 with the sum {len(batch)}"
        )
    runs = bounds(num_rows)
    parts = dense_parts(batch.leaves())
    sent: dict[Part, Sequence[int]] = {}
    for key, part in parts:
        sent[key, part] = num_rows
        if part == "values":
            lengths = parts[key, "lengths"]
            sent[key, part] = [int(lengths[start:end].sum()) for start, end in runs]
    columns = {name: [values[a:b] for a, b in runs] for name, values in batch.columns.items()}
    mine = describe(len(batch), parts, columns, batch.meta, sent, tuple(num_rows))
    if any(leaf.requires_grad for leaf in mine.leaves.values()):
        raise ValueError("all_to_all: a tensor requires a gradient; detach it first")
    schemas = agree("all_to_all", mine, group)
    parts = {part: parts[part] for part in schemas[0].leaves}  # one order on all ranks
    meta = merge_meta([schema.meta for schema in schemas], policy, "rank")
    rank = group.rank()
    finish = transport.exchange(
        list(parts.values()),
        [sent[part] for part in parts],
        [[schema.counts[part][rank] for schema in schemas] for part in parts],
        group,
        batch.device,
    )

    def result() -> Rows:
        received = {name: [v for s in schemas for v in s.columns[name][rank]] for name in columns}
        tensors = leaves_of(dict(zip(parts, finish(), strict=True)))
        return Rows(sum(s.sent_rows[rank] for s in schemas), tensors, received, meta)

    return result


def broadcast(
    batch: "Batch | None", group: dist.ProcessGroup, root: int, device: torch.device
) -> Exchange:
    """Starts a broadcast of the root's batch; the result waits."""
    source = dist.get_global_rank(group, root)
    told: list[Any] = [None]
    parts: dict[Part, Tensor] = {}
    if group.rank() == root and batch is not None:
        parts = dense_parts(batch.leaves())
        told = [describe(len(batch), parts, batch.columns, batch.meta)]
    dist.broadcast_object_list(told, src=source, group=group)
    if told[0] is None:
        raise ValueError(f"broadcast: rank {root} is the root and has no batch")
    schema: Schema = told[0]
    if group.rank() != root:
        parts = {
            part: torch.empty(0, *leaf.row_shape, dtype=leaf.dtype, device=device)
            for part, leaf in schema.leaves.items()
        }
    like = list(parts.values())
    rows = [schema.counts[part][0] for part in parts]
    data = torch.zeros(transport.packed_nbytes(like, rows), dtype=torch.uint8, device=device)
    if group.rank() == root:
        transport.pack(like, data)
    work = dist.broadcast(data, src=source, group=group, async_op=True)

    def result() -> Rows:
        work.wait()
        tensors = [tensor.clone() for tensor in transport.unpack(data, like, rows)]
        leaves = leaves_of(dict(zip(parts, tensors, strict=True)))
        return Rows(schema.num_rows, leaves, schema.columns, schema.meta)

    return result


def _with_gradients(
    differentiable: Any,
    start: Callable[[list[Tensor], list[list[int]]], Callable[[], list[Tensor]]],
    parts: Mapping[Part, Tensor],
    schema: Schema,
    counts: Mapping[Part, list[int]],
    group: dist.ProcessGroup,
) -> Callable[[], dict[Part, Tensor]]:
    """Starts the tensors without a gradient, and runs the others through an autograd function.

    Args:
        schema: rank 0's; its order of tensors is the one on all ranks.
    """
    tracked = [part for part, leaf in schema.leaves.items() if leaf.requires_grad]
    others = [part for part in schema.leaves if part not in set(tracked)]
    finish = start([parts[part] for part in others], [counts[part] for part in others])
    found: dict[Part, Tensor] = {}
    if tracked:
        sizes = [counts[part] for part in tracked]
        outputs = differentiable.apply(sizes, group, *(parts[part] for part in tracked))
        found.update(zip(tracked, outputs, strict=True))

    def result() -> dict[Part, Tensor]:
        found.update(zip(others, finish(), strict=True))
        return {part: found[part] for part in schema.leaves}

    return result
