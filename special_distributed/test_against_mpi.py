"""The same collectives through MPI, where the job has one: the same bits.

The inputs are small integers, whose sums and products are exact in every type: MPI may combine the
ranks in any order.
"""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from primitives.collectives import all_gather_flat, reduce_scatter_flat
from special_distributed.examples import examples

NUM_RANKS = 4
FLOATS = [torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
NUMELS = st.one_of(st.integers(0, 70), st.sampled_from([16_384, 16_385, 131_073]))
SEEDS = st.integers(0, 2**20)
DTYPES = st.sampled_from(FLOATS + INTEGERS)
OPS = {  # ours, MPI's name, for floats too
    "sum": (dist.ReduceOp.SUM, "SUM", True),
    "product": (dist.ReduceOp.PRODUCT, "PROD", True),
    "min": (dist.ReduceOp.MIN, "MIN", True),
    "max": (dist.ReduceOp.MAX, "MAX", True),
    "band": (dist.ReduceOp.BAND, "BAND", False),
    "bor": (dist.ReduceOp.BOR, "BOR", False),
    "bxor": (dist.ReduceOp.BXOR, "BXOR", False),
}


def drawn(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (numel,), generator=generator).to(dtype)


def assert_same(ours: Tensor, theirs: np.ndarray[Any, Any]) -> None:
    assert ours.numpy().tobytes() == theirs.tobytes()


def through_mpi(
    x: Tensor, numel: int, call: Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], None]
) -> np.ndarray[Any, Any]:
    """What ``call(input, output)`` of mpi4py puts into an output of ``numel`` elements."""
    output = np.zeros(numel, dtype=x.numpy().dtype)
    call(x.numpy(), output)
    return output


@examples(30, op=st.sampled_from(sorted(OPS)), dtype=DTYPES, numel=NUMELS, seed=SEEDS)
def test_reductions(
    world: dist.ProcessGroup,
    rank: int,
    mpi: Any,
    op: str,
    dtype: torch.dtype,
    numel: int,
    seed: int,
) -> None:
    ours, name, floats = OPS[op]
    if dtype.is_floating_point and not floats:
        dtype = torch.int32
    comm, theirs, root = mpi.COMM_WORLD, getattr(mpi, name), seed % NUM_RANKS
    x = drawn(numel, dtype, seed + rank)
    got = x.clone()
    dist.all_reduce(got, ours)
    assert_same(got, through_mpi(x, numel, lambda i, o: comm.Allreduce(i, o, theirs)))
    got = x.clone()
    dist.reduce(got, root, ours)
    want = through_mpi(x, numel, lambda i, o: comm.Reduce(i, o, theirs, root))
    if rank == root:
        assert_same(got, want)
    full, shard = drawn(numel * NUM_RANKS, dtype, seed + rank), torch.empty(numel, dtype=dtype)
    reduce_scatter_flat(shard, full, ours)
    assert_same(
        shard, through_mpi(full, numel, lambda i, o: comm.Reduce_scatter_block(i, o, theirs))
    )


@examples(30, root=st.integers(0, NUM_RANKS - 1), dtype=DTYPES, numel=NUMELS, seed=SEEDS)
def test_moving(
    world: dist.ProcessGroup,
    rank: int,
    mpi: Any,
    root: int,
    dtype: torch.dtype,
    numel: int,
    seed: int,
) -> None:
    comm, total = mpi.COMM_WORLD, numel * NUM_RANKS
    x, full = drawn(numel, dtype, seed + rank), drawn(total, dtype, seed + 10 + rank)
    got = torch.empty(total, dtype=dtype)
    all_gather_flat(got, x)
    assert_same(got, through_mpi(x, total, comm.Allgather))
    dist.all_to_all_single(got, full)
    assert_same(got, through_mpi(full, total, comm.Alltoall))
    got = x.clone()
    dist.broadcast(got, root)
    want = x.numpy().copy()
    comm.Bcast(want, root)
    assert_same(got, want)
    parts = [torch.empty(numel, dtype=dtype) for _ in range(NUM_RANKS)] if rank == root else None
    dist.gather(x, parts, dst=root)
    want = through_mpi(x, total, lambda i, o: comm.Gather(i, o, root))
    if parts is not None:
        assert_same(torch.cat(parts), want)
    dist.scatter(got, list(full.view(NUM_RANKS, numel)) if rank == root else None, src=root)
    assert_same(got, through_mpi(full, numel, lambda i, o: comm.Scatter(i, o, root)))


@examples(
    15,
    splits=st.lists(st.lists(NUMELS, min_size=4, max_size=4), min_size=4, max_size=4),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_uneven_parts(
    world: dist.ProcessGroup,
    rank: int,
    mpi: Any,
    splits: list[list[int]],
    dtype: torch.dtype,
    seed: int,
) -> None:
    comm, numels = mpi.COMM_WORLD, splits[0]
    x = drawn(numels[rank], dtype, seed + rank)
    outs = [torch.empty(n, dtype=dtype) for n in numels]
    dist.all_gather(outs, x)
    want = through_mpi(x, sum(numels), lambda i, o: comm.Allgatherv(i, [o, numels]))
    assert_same(torch.cat(outs), want)
    sent, received = splits[rank], [row[rank] for row in splits]
    full, got = drawn(sum(sent), dtype, seed + 9 + rank), torch.empty(sum(received), dtype=dtype)
    dist.all_to_all_single(got, full, received, sent)
    assert_same(
        got,
        through_mpi(full, sum(received), lambda i, o: comm.Alltoallv([i, sent], [o, received])),
    )


def test_the_comparison_fails_on_a_wrong_bit(mpi: Any, rank: int) -> None:
    x = drawn(9, torch.float32, rank)
    wrong = through_mpi(x, 9, lambda i, o: mpi.COMM_WORLD.Allreduce(i, o, mpi.MAX))
    wrong.view(np.uint8)[rank] ^= 1
    dist.all_reduce(x, dist.ReduceOp.MAX)
    with pytest.raises(AssertionError):
        assert_same(x, wrong)
