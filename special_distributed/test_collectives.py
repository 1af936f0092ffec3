"""Every collective against its plain definition, on examples that all ranks draw alike.

The inputs of all ranks follow from the example, so each rank knows what it must receive, bit for
bit; magnitudes are spread so that a sum in another order has other bits.
"""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from primitives import reference
from primitives.collectives import all_gather_flat, reduce_scatter_flat
from special_distributed.examples import examples

NUM_RANKS = 4
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int8, torch.uint8]
OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
}
# Around the limits of a cache line and of a staging slot (512 KiB), and where nothing is even.
NUMELS = st.one_of(st.integers(0, 70), st.sampled_from([1023, 131072, 131073, 300001]))
SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from(FLOATS + INTEGERS)
OBJECTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def one_per_rank(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """One value for each rank."""
    return st.lists(strategy, min_size=NUM_RANKS, max_size=NUM_RANKS)


def values(seed: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 100, (numel,), generator=generator).to(dtype)
    scale = torch.randint(-6, 7, (numel,), generator=generator).double()
    return (torch.randn(numel, generator=generator).double() * 2.0**scale).to(dtype)


def inputs(seed: int, numels: list[int], dtype: torch.dtype) -> list[Tensor]:
    return [values(seed + source, numel, dtype) for source, numel in enumerate(numels)]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same dtype, shape and bits; on failure the first element that differs."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    a, b = (
        x.contiguous().view(torch.uint8).reshape(x.numel(), x.itemsize) for x in (actual, expected)
    )
    differing = (a != b).any(dim=1).nonzero().flatten().tolist()
    if differing:
        i = differing[0]
        got, want = actual.flatten()[i].item(), expected.flatten()[i].item()
        pytest.fail(f"{len(differing)} of {len(a)} differ, first [{i}]: got {got!r}, not {want!r}")


@examples(40, op=st.sampled_from(sorted(OPS)), dtype=DTYPES, numel=NUMELS, seed=SEEDS)
def test_all_reduce(
    world: dist.ProcessGroup, rank: int, op: str, dtype: torch.dtype, numel: int, seed: int
) -> None:
    if op == "avg" and not dtype.is_floating_point:
        op = "sum"
    xs = inputs(seed, [numel] * NUM_RANKS, dtype)
    mine = xs[rank].clone()
    dist.all_reduce(mine, OPS[op])
    assert_same(mine, reference.reduce(xs, op))


@examples(25, op=st.sampled_from(["sum", "avg", "max"]), dtype=DTYPES, numel=NUMELS, seed=SEEDS)
def test_reduce_scatter(
    world: dist.ProcessGroup, rank: int, op: str, dtype: torch.dtype, numel: int, seed: int
) -> None:
    if op == "avg" and not dtype.is_floating_point:
        op = "sum"
    xs = inputs(seed, [numel * NUM_RANKS] * NUM_RANKS, dtype)
    shard = torch.empty(numel, dtype=dtype)
    reduce_scatter_flat(shard, xs[rank], OPS[op])
    assert_same(shard, reference.reduce(xs, op)[rank * numel : (rank + 1) * numel])


@examples(25, dtype=DTYPES, numel=NUMELS, seed=SEEDS)
def test_all_gather_into_tensor(
    world: dist.ProcessGroup, rank: int, dtype: torch.dtype, numel: int, seed: int
) -> None:
    xs = inputs(seed, [numel] * NUM_RANKS, dtype)
    full = torch.empty(NUM_RANKS * numel, dtype=dtype)
    all_gather_flat(full, xs[rank])
    assert_same(full, torch.cat(xs))


@examples(25, dtype=DTYPES, numels=one_per_rank(NUMELS), seed=SEEDS)
def test_all_gather_of_uneven_shards(
    world: dist.ProcessGroup, rank: int, dtype: torch.dtype, numels: list[int], seed: int
) -> None:
    xs = inputs(seed, numels, dtype)
    outputs = [torch.empty_like(x) for x in xs]
    dist.all_gather(outputs, xs[rank])
    for output, x in zip(outputs, xs, strict=True):
        assert_same(output, x)


@examples(
    25,
    dtype=DTYPES,
    splits=one_per_rank(one_per_rank(NUMELS)),
    seed=SEEDS,
)
def test_all_to_all_with_splits(
    world: dist.ProcessGroup, rank: int, dtype: torch.dtype, splits: list[list[int]], seed: int
) -> None:
    sent = [values(seed + r, sum(splits[r]), dtype) for r in range(NUM_RANKS)]
    received = reference.all_to_all([torch.split(x, s) for x, s in zip(sent, splits, strict=True)])[
        rank
    ]
    output = torch.empty(sum(len(x) for x in received), dtype=dtype)
    dist.all_to_all_single(output, sent[rank], [len(x) for x in received], splits[rank])
    assert_same(output, torch.cat(received))


@examples(20, root=st.integers(0, 3), dtype=DTYPES, numel=NUMELS, seed=SEEDS)
def test_broadcast_gather_scatter(
    world: dist.ProcessGroup, rank: int, root: int, dtype: torch.dtype, numel: int, seed: int
) -> None:
    xs = inputs(seed, [numel] * NUM_RANKS, dtype)
    mine = xs[rank].clone()
    dist.broadcast(mine, root)
    assert_same(mine, xs[root])
    gathered = [torch.empty_like(x) for x in xs] if rank == root else None
    dist.gather(xs[rank], gathered, dst=root)
    for output, x in zip(gathered or [], xs, strict=False):
        assert_same(output, x)
    part = torch.empty(numel, dtype=dtype)
    dist.scatter(part, xs if rank == root else None, src=root)
    assert_same(part, xs[rank])


@examples(20, step=st.integers(1, 3), dtype=DTYPES, numel=NUMELS, tag=st.integers(0, 9), seed=SEEDS)
def test_send_and_recv_around_the_ring(
    world: dist.ProcessGroup,
    rank: int,
    step: int,
    dtype: torch.dtype,
    numel: int,
    tag: int,
    seed: int,
) -> None:
    xs = inputs(seed, [numel] * NUM_RANKS, dtype)
    src, dst = (rank - step) % NUM_RANKS, (rank + step) % NUM_RANKS
    output = torch.empty(numel, dtype=dtype)
    works: list[Any] = [dist.isend(xs[rank], dst, tag=tag), dist.irecv(output, src, tag=tag)]
    for work in works:
        work.wait()
    assert_same(output, xs[src])


@examples(10, numels=st.lists(st.integers(1, 5000), min_size=1, max_size=6), seed=SEEDS)
def test_asynchronous_collectives_keep_their_order(
    world: dist.ProcessGroup, rank: int, numels: list[int], seed: int
) -> None:
    all_inputs = [inputs(seed + i, [n] * NUM_RANKS, torch.float32) for i, n in enumerate(numels)]
    mine = [xs[rank].clone() for xs in all_inputs]
    works: list[Any] = [dist.all_reduce(x, async_op=True) for x in mine]
    for work in reversed(works):
        work.wait()
    for x, xs in zip(mine, all_inputs, strict=True):
        assert_same(x, reference.reduce(xs))


@examples(10, dtype=DTYPES, rows=st.integers(1, 40), seed=SEEDS)
def test_all_reduce_of_a_strided_view(
    world: dist.ProcessGroup, rank: int, dtype: torch.dtype, rows: int, seed: int
) -> None:
    xs = [x.reshape(rows, 6) for x in inputs(seed, [rows * 6] * NUM_RANKS, dtype)]
    mine = xs[rank].clone()
    dist.all_reduce(mine[:, ::2])
    expected = xs[rank].clone()
    expected[:, ::2] = reference.reduce([x[:, ::2].contiguous() for x in xs])
    assert_same(mine, expected)  # what lies between is untouched


@examples(
    10, colors=one_per_rank(st.integers(0, 3)), turns=one_per_rank(st.integers(0, 4)), seed=SEEDS
)
def test_subgroups_are_independent(
    world: dist.ProcessGroup, rank: int, colors: list[int], turns: list[int], seed: int
) -> None:
    members = {color: [r for r in range(NUM_RANKS) if colors[r] == color] for color in set(colors)}
    groups = {color: dist.new_group(members[color]) for color in sorted(members)}
    mine = groups[colors[rank]]
    for turn in range(turns[colors[rank]]):  # another number of calls in each
        xs = inputs(seed + turn, [7] * NUM_RANKS, torch.float32)
        x = xs[rank].clone()
        dist.all_reduce(x, group=mine)
        assert_same(x, reference.reduce([xs[r] for r in members[colors[rank]]]))
    dist.barrier()
    dist.destroy_process_group(mine)


@examples(15, objects=one_per_rank(OBJECTS), root=st.integers(0, 3))
def test_objects(world: dist.ProcessGroup, rank: int, objects: list[Any], root: int) -> None:
    gathered: list[Any] = [None] * NUM_RANKS
    dist.all_gather_object(gathered, objects[rank])
    assert gathered == objects
    received = [objects[root] if rank == root else None]
    dist.broadcast_object_list(received, src=root)
    assert received == [objects[root]]


def test_checker_catches_one_bit() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"1 of 2 differ, first \[1\]"):
        assert_same(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
