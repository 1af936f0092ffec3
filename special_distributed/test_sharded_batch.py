"""Sharded batches of random schemas on four ranks: what goes out and back is the same bits."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from primitives.sharded_tensordict import ShardedTensorDict
from primitives.sharded_tensordict.rows import even_counts
from special_distributed.batches import Plan, batch_of, contents, counts, plans, summable_plans
from special_distributed.examples import examples

NUM_RANKS = 4


@pytest.fixture
def line(world: dist.ProcessGroup) -> DeviceMesh:
    return init_device_mesh("cpu", (NUM_RANKS,), mesh_dim_names=("dp",))


@pytest.fixture
def square(world: dist.ProcessGroup) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def on_mesh(batch: ShardedTensorDict, mesh: DeviceMesh) -> ShardedTensorDict:
    return ShardedTensorDict.from_local(batch, mesh, "dp")


def all_parts(plan: Plan, num_rows: tuple[int, ...]) -> list[ShardedTensorDict]:
    return [batch_of(plan, num, seed) for seed, num in enumerate(num_rows)]


@examples(40, plan=plans, num_rows=counts)
def test_all_gather(line: DeviceMesh, rank: int, plan: Plan, num_rows: tuple[int, ...]) -> None:
    parts = all_parts(plan, num_rows)
    mine = on_mesh(parts[rank], line)
    handle = mine.all_gather_async()
    full = mine.all_gather()
    expected = contents(ShardedTensorDict.concat(parts))
    assert contents(full) == contents(handle.wait()) == contents(handle.wait()) == expected
    assert handle.wait() is handle.wait()
    again = ShardedTensorDict.from_global(full, line, "dp")
    assert contents(again) == expected[slice(*_run(sum(num_rows), rank))]
    assert contents(again.all_gather()) == expected
    assert mine.num_rows_by_rank() == list(num_rows)


def _run(num_rows: int, rank: int) -> tuple[int, int]:
    sizes = even_counts(num_rows, NUM_RANKS)
    return sum(sizes[:rank]), sum(sizes[: rank + 1])


@examples(40, plan=plans, sizes=st.lists(counts, min_size=4, max_size=4))
def test_all_to_all_there_and_back(
    line: DeviceMesh, rank: int, plan: Plan, sizes: list[tuple[int, ...]]
) -> None:
    parts = all_parts(plan, tuple(map(sum, sizes)))
    mine = on_mesh(parts[rank], line)
    there = mine.all_to_all(sizes[rank])
    cuts = [contents(part) for part in parts]
    expected = []
    for peer in range(NUM_RANKS):
        start = sum(sizes[peer][:rank])
        expected += cuts[peer][start : start + sizes[peer][rank]]
    assert contents(there) == expected
    back = there.all_to_all([sizes[peer][rank] for peer in range(NUM_RANKS)])
    assert contents(back) == contents(mine)


@examples(40, plan=plans, num_rows=counts)
def test_redistribute_there_and_back(
    square: DeviceMesh, plan: Plan, num_rows: tuple[int, ...]
) -> None:
    dp, tp = square["dp"].get_local_rank(), square["tp"].get_local_rank()
    parts = all_parts(plan, num_rows[:2])
    everything = contents(ShardedTensorDict.concat(parts))
    over_tp = on_mesh(parts[dp], square).redistribute("tp")
    sizes = even_counts(len(everything), 2)
    assert contents(over_tp) == (everything[: sizes[0]], everything[sizes[0] :])[tp]
    over_dp = over_tp.redistribute("dp")
    assert contents(over_dp) == (everything[: sizes[0]], everything[sizes[0] :])[dp]
    assert over_dp.mesh_dim == "dp"


@examples(15, plan=plans, num_rows=counts, root=st.integers(0, 3))
def test_broadcast(
    line: DeviceMesh, rank: int, plan: Plan, num_rows: tuple[int, ...], root: int
) -> None:
    parts = all_parts(plan, num_rows)
    mine = parts[rank] if rank in (root, 0) else None
    got = ShardedTensorDict.broadcast(mine, line, "dp", root=root)
    assert contents(got) == contents(parts[root])
    assert repr(got.meta) == repr(parts[root].meta)


@examples(40, num_rows=st.integers(0, 9), op=st.sampled_from(["sum", "avg", "min", "max"]))
def test_reduce_scatter(line: DeviceMesh, rank: int, num_rows: int, op: str) -> None:
    def full(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(-8, 8, (num_rows, 3), generator=generator) * 4
        return {"i": numbers, "f": numbers[:, 0].float(), "h": numbers.to(torch.bfloat16)}

    words = [str(row) for row in range(num_rows)]
    batch = ShardedTensorDict(TensorDict(full(rank), batch_size=[num_rows]), {"s": words})
    if op == "avg":
        batch = batch.select(["f", "h"])
    shard = batch.reduce_scatter(line, "dp", op=op)
    start, end = _run(num_rows, rank)
    for key, leaf in shard.leaves().items():
        stacked = torch.stack([full(peer)[key] for peer in range(NUM_RANKS)]).double()
        reduced = {"sum": stacked.sum(0), "avg": stacked.mean(0), "min": stacked.amin(0)}
        expected = reduced.get(op, stacked.amax(0))
        assert leaf.dtype == batch.leaves()[key].dtype
        assert torch.equal(leaf.double(), expected[start:end])
    assert list(shard.columns["s"]) == words[start:end]
    # What all have, averaged, is what they have: gathering undoes scattering.
    same = ShardedTensorDict(TensorDict({"f": full(0)["f"]}, batch_size=[num_rows]))
    again = same.reduce_scatter(line, "dp", op="avg").all_gather(line, "dp")
    assert torch.equal(again.tensors["f"], same.tensors["f"])


@examples(40, plan=summable_plans, num_rows=st.integers(0, 9))
def test_all_gather_undoes_reduce_scatter(line: DeviceMesh, plan: Plan, num_rows: int) -> None:
    """The maximum of what is equal on all ranks is just that."""
    batch = batch_of(plan, num_rows, 1)
    for key, leaf in batch.leaves().items():
        if leaf.is_floating_point():
            batch.tensors[key] = leaf.nan_to_num()
    shard = batch.reduce_scatter(line, "dp", op="max")
    assert contents(shard.all_gather()) == contents(batch)


@examples(15, plan=plans, num_rows=counts, divisor=st.integers(1, 5))
def test_padding_goes_along(
    line: DeviceMesh, rank: int, plan: Plan, num_rows: tuple[int, ...], divisor: int
) -> None:
    parts = all_parts(plan, num_rows)
    padded = on_mesh(parts[rank], line).pad_to_divisor(divisor)
    expected = contents(ShardedTensorDict.concat(parts))
    full = padded.all_gather()
    assert len(full) % divisor == 0
    assert contents(full.unpad()) == expected
    even = padded.all_to_all(even_counts(len(padded), NUM_RANKS))
    assert sorted(map(repr, contents(even.unpad().all_gather()))) == sorted(map(repr, expected))


def test_gradients(line: DeviceMesh, rank: int) -> None:
    num_rows = (2, 0, 3, 1)
    mine = torch.randn(num_rows[rank], 2, dtype=torch.float64).requires_grad_()
    lengths = torch.arange(num_rows[rank]) + 1
    values = torch.randn(int(lengths.sum()), dtype=torch.float64).requires_grad_()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    jagged = torch.nested.nested_tensor_from_jagged(values, offsets)
    fixed = torch.arange(num_rows[rank])
    tensors = TensorDict({"x": mine, "j": jagged, "n": fixed}, batch_size=[num_rows[rank]])
    full = ShardedTensorDict(tensors).all_gather(line, "dp")
    weights = torch.arange(6.0, dtype=torch.float64)[:, None] * (rank + 1)
    loss = (full.tensors["x"] * weights).sum() + (rank + 1) * full.tensors["j"].values().sum()
    loss.backward()
    first = sum(num_rows[:rank])
    expected = torch.arange(first, first + num_rows[rank], dtype=torch.float64)[:, None] * 10
    assert mine.grad is not None
    assert values.grad is not None
    assert torch.equal(mine.grad, expected.expand_as(mine))
    assert torch.equal(values.grad, torch.full_like(values, 10))

    whole = torch.randn(6, 2).requires_grad_()
    shard = ShardedTensorDict(TensorDict({"x": whole}, batch_size=[6])).reduce_scatter(line, "dp")
    (shard.tensors["x"] * (rank + 1)).sum().backward()
    owners = torch.tensor([1.0, 1, 2, 2, 3, 4])[:, None]
    assert whole.grad is not None
    assert torch.equal(whole.grad, owners.expand_as(whole))


def test_placements(line: DeviceMesh, rank: int) -> None:
    table = distribute_tensor(torch.arange(8.0), line, [Shard(0)])
    rows = torch.arange(2.0) + 2 * rank
    batch = ShardedTensorDict(
        TensorDict({"x": rows}, batch_size=[2]),
        mesh=line,
        mesh_dim="dp",
        replicated={"table": table, "scale": torch.ones(3)},
    )
    assert batch.placements("x") == (Shard(0),)
    assert batch.placements("table") == (Shard(0),)
    assert batch.placements("scale") == (Replicate(),)
    assert batch.global_shape("x") == batch.global_shape("table") == (8,)
    assert torch.equal(batch.to_dtensor("x").full_tensor(), torch.arange(8.0))
    assert torch.equal(batch.to_dtensor("scale").full_tensor(), torch.ones(3))
    assert batch.to_dtensor("table") is table
    with pytest.raises(ValueError, match="x is a DTensor; it belongs in replicated"):
        ShardedTensorDict(TensorDict({"x": table}, batch_size=[8]))
    full = batch[1:].all_gather()
    assert full.replicated.keys() == {"table", "scale"}
    assert full.placements("x") == (Replicate(),)
    uneven = ShardedTensorDict.from_local(batch[: rank % 2 + 1], line, "dp")
    with pytest.raises(ValueError, match=r"rows by rank are \[1, 2, 1, 2\], DTensor needs"):
        uneven.to_dtensor("x")
    with pytest.raises(ValueError, match="tensors: no y; have x"):
        batch.placements("y")


def jagged(*lengths: int) -> Tensor:
    tensor: Tensor = torch.nested.nested_tensor(
        [torch.ones(length) for length in lengths], layout=torch.jagged
    )
    return tensor


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(2, 3)}, r"x: rank 2 has torch.float32 rows of shape \[3\], rank 0 .* \[\]"),
    ({"x": torch.ones(2).double()}, r"x: rank 2 has torch.float64 .*, rank 0 has torch.float32"),
    ({"x": jagged(1, 2)}, "x: jagged on rank 2, dense on rank 0"),
    ({"x": torch.ones(2).requires_grad_()}, r"rank 2 has .* with gradient, rank 0 has"),
    ({"y": torch.ones(2)}, "rank 2 lacks x; rank 2 also has y"),
    ({"x": torch.ones(2), "y": torch.ones(2)}, "rank 2 also has y"),
]


@pytest.mark.parametrize(("tensors", "message"), MISTAKES)
def test_what_does_not_fit_is_refused_on_every_rank(
    tensors: dict[str, Any], message: str, line: DeviceMesh, rank: int
) -> None:
    mine = tensors if rank == 2 else {"x": torch.ones(2)}
    batch = ShardedTensorDict(TensorDict(mine, batch_size=[2]), mesh=line, mesh_dim="dp")
    calls = (batch.all_gather, batch.reduce_scatter, lambda: batch.all_to_all([2, 0, 0, 0]))
    for call in calls[: 2 if "gradient" in message else 3]:
        with pytest.raises(ValueError, match=message):
            call()


def test_other_mistakes(line: DeviceMesh, rank: int) -> None:
    def make(num_rows: int, **more: Any) -> ShardedTensorDict:
        tensors = TensorDict({"x": torch.ones(num_rows)}, batch_size=[num_rows])
        return ShardedTensorDict(tensors, mesh=line, mesh_dim="dp", **more)

    with pytest.raises(ValueError, match="rank 3 has 1 rows, rank 0 has 2"):
        make(1 if rank == 3 else 2).reduce_scatter()
    with pytest.raises(ValueError, match="op 'mean', expected one of sum"):
        make(2).reduce_scatter(op="mean")
    with pytest.raises(ValueError, match=r"meta seed: rank 1 has 1, rank 0 has 0"):
        make(2, meta={"seed": rank}).all_gather()
    assert make(2, meta={"seed": rank}).all_gather(meta="gather").meta == {"seed": [0, 1, 2, 3]}
    assert make(2, meta={"seed": rank}).all_gather(meta="first").meta == {"seed": 0}
    with pytest.raises(ValueError, match=r"columns of rank 1 has"):
        make(1, columns={"s": [rank]}).reduce_scatter()
    with pytest.raises(ValueError, match=r"got \[2, 0\] rows for the ranks, expected 4 numbers"):
        make(2).all_to_all([2, 0])
    with pytest.raises(ValueError, match="rank 2 is the root and has no batch"):
        ShardedTensorDict.broadcast(None, line, "dp", root=2)
    nested = ShardedTensorDict(TensorDict({"j": jagged(1, 2)}, batch_size=[2]))
    with pytest.raises(ValueError, match="jagged rows have no sum"):
        nested.reduce_scatter(line, "dp")
    leaf = torch.ones(2, requires_grad=True)
    tracked = ShardedTensorDict(TensorDict({"x": leaf}, batch_size=[2]))
    with pytest.raises(ValueError, match="avg has no gradient, sum has"):
        tracked.reduce_scatter(line, "dp", op="avg")
    with pytest.raises(ValueError, match="requires a gradient; detach"):
        tracked.all_to_all([2, 0, 0, 0], line, "dp")
