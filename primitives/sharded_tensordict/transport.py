"""Lists of dense tensors on their way between ranks: one collective for all of them, or per dtype.

Every function takes, for each tensor, how many of its rows each rank has (``counts[i][rank]``); the
rest of the shape and the dtype are the same on all ranks (``schema.py``). Bytes are copied as they
are; sums are the backend's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from primitives.collectives import reduce_scatter_flat
from primitives.sharded_tensordict.rows import bounds

ALIGNMENT_NBYTES = 16  # each tensor starts where any dtype may start

Counts = Sequence[Sequence[int]]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES


def _row_nbytes(tensor: Tensor) -> int:
    return tensor.shape[1:].numel() * tensor.dtype.itemsize


def packed_nbytes(like: Sequence[Tensor], rows: Sequence[int]) -> int:
    """Of tensors like these with so many rows."""
    return sum(_aligned(n * _row_nbytes(t)) for t, n in zip(like, rows, strict=True))


def pack(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Copies tensors one after the other into ``out``, flat uint8."""
    offset = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.dtype.itemsize
        if nbytes:
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            out[offset : offset + nbytes] = data
        offset += _aligned(nbytes)


def unpack(data: Tensor, like: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    """The tensors in ``data``; views of it."""
    tensors, offset = [], 0
    for tensor, num_rows in zip(like, rows, strict=True):
        nbytes = num_rows * _row_nbytes(tensor)
        flat = data[offset : offset + nbytes].view(tensor.dtype)
        tensors.append(flat.reshape(num_rows, *tensor.shape[1:]))
        offset += _aligned(nbytes)
    return tensors


def gather(
    mine: Sequence[Tensor], counts: Counts, group: dist.ProcessGroup, device: torch.device
) -> Callable[[], list[Tensor]]:
    """Starts gathering the rows of all ranks; the result waits, and gives them in rank order."""
    by_rank = list(zip(*counts, strict=True)) or [()] * group.size()
    # The largest decides, so that any backend can do it; and no rows at all are no special case.
    nbytes = max(ALIGNMENT_NBYTES, *(packed_nbytes(mine, rows) for rows in by_rank))
    packed = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    pack(mine, packed)
    full = [torch.empty_like(packed) for _ in by_rank]
    work = dist.all_gather(full, packed, group=group, async_op=True)

    def finish() -> list[Tensor]:
        work.wait()
        parts = [unpack(data, mine, rows) for data, rows in zip(full, by_rank, strict=True)]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    return finish


def exchange(
    mine: Sequence[Tensor],
    sent: Sequence[Sequence[int]],
    received: Sequence[Sequence[int]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> Callable[[], list[Tensor]]:
    """Starts an all_to_all: ``sent[i][rank]`` consecutive rows of ``mine[i]`` go to each rank.

    Args:
        received: ``received[i][rank]``, rows of tensor i that come from each rank.

    Returns:
        A function that waits and gives the rows received, in rank order.
    """
    to_rank = list(zip(*sent, strict=True)) or [()] * group.size()
    from_rank = list(zip(*received, strict=True)) or [()] * group.size()
    sizes_out = [packed_nbytes(mine, rows) for rows in to_rank]
    sizes_in = [packed_nbytes(mine, rows) for rows in from_rank]
    outgoing = torch.zeros(sum(sizes_out), dtype=torch.uint8, device=device)
    runs = [bounds(rows) for rows in sent]
    for rank, (start, end) in enumerate(bounds(sizes_out)):
        pieces = [t[slice(*run[rank])] for t, run in zip(mine, runs, strict=True)]
        pack(pieces, outgoing[start:end])
    incoming = torch.empty(sum(sizes_in), dtype=torch.uint8, device=device)
    work = dist.all_to_all_single(
        incoming, outgoing, sizes_in, sizes_out, group=group, async_op=True
    )

    def finish() -> list[Tensor]:
        work.wait()
        parts = [
            unpack(incoming[start:end], mine, rows)
            for (start, end), rows in zip(bounds(sizes_in), from_rank, strict=True)
        ]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    return finish


def reduce_rows(
    fulls: Sequence[Tensor], counts: Counts, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM
) -> Callable[[], list[Tensor]]:
    """Starts reducing full tensors over the ranks, each rank getting its rows; one collective per
    dtype. The result waits, and gives the shards.
    """
    num_ranks, rank = group.size(), group.rank()
    started = []
    for dtype in dict.fromkeys(full.dtype for full in fulls):
        chosen = [i for i, full in enumerate(fulls) if full.dtype == dtype]
        rows = [max(counts[i]) for i in chosen]
        shapes = [(n, *fulls[i].shape[1:]) for i, n in zip(chosen, rows, strict=True)]
        numels = [torch.Size(shape).numel() for shape in shapes]
        stacked = torch.zeros(num_ranks, sum(numels), dtype=dtype, device=fulls[chosen[0]].device)
        for i, (start, _) in zip(chosen, bounds(numels), strict=True):
            for peer, (first, last) in enumerate(bounds(counts[i])):
                flat = fulls[i].detach()[first:last].reshape(-1)
                stacked[peer, start : start + flat.numel()] = flat
        shard = stacked.new_empty(sum(numels))
        work = None
        if shard.numel():
            work = reduce_scatter_flat(shard, stacked.view(-1), op=op, group=group, async_op=True)
        started.append((chosen, shapes, numels, shard, work, stacked))

    def finish() -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for chosen, shapes, numels, shard, work, _ in started:
            if work is not None:
                work.wait()
            for i, shape, (start, end) in zip(chosen, shapes, bounds(numels), strict=True):
                found[i] = shard[start:end].view(shape)[: counts[i][rank]].clone()
        return [found[i] for i in range(len(fulls))]

    return finish


class GatherRows(torch.autograd.Function):
    """``gather`` with gradients: rows sum what all ranks say about them. Backward is collective."""

    @staticmethod
    def forward(
        ctx: Any, counts: Counts, group: dist.ProcessGroup, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.counts, ctx.group = counts, group
        return tuple(gather(tensors, counts, group, tensors[0].device)())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *reduce_rows(grads, ctx.counts, ctx.group)()


class ReduceRows(torch.autograd.Function):
    """``reduce_rows`` by sum, with gradients: each rank's full tensor gets all rows' gradients."""

    @staticmethod
    def forward(
        ctx: Any, counts: Counts, group: dist.ProcessGroup, *fulls: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.counts, ctx.group = counts, group
        return tuple(reduce_rows(fulls, counts, group)())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *gather(grads, ctx.counts, ctx.group, grads[0].device)()
