"""The order of leaves does not know who held them; one owner each; replicas are compared."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from primitives.layout import NUM_PARTS, NUM_SLICES
from scenarios.parallel.leaves import LeafRun, LeafTable, ReplicasDiffer

ALL = range(NUM_SLICES)


def runs_of(tp: int, dp: int, tp_rank: int, dp_rank: int) -> list[LeafRun]:
    """A parameter that tp cuts and one that it does not."""
    parts, slices = NUM_PARTS // tp, NUM_SLICES // dp
    mine = range(dp_rank * slices, (dp_rank + 1) * slices)
    blocks = range(tp_rank * parts, (tp_rank + 1) * parts)
    return [LeafRun("cut", NUM_PARTS, blocks, mine), LeafRun("whole", 1, range(1), mine)]


def gathered(every: list[list[LeafRun]], value_of: dict[str, int]) -> torch.Tensor:
    """What all ranks hand over, [ranks, rows, 1] int64."""
    rows = []
    for rank, runs in enumerate(every):
        values = [value_of[name] for run in runs for name in run.names()]
        rows.append(LeafTable(every, rank).pad(torch.tensor(values)[:, None]))
    return torch.stack(rows)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_sorted_leaves_do_not_depend_on_the_holders(tp: int, dp: int, zero1: bool) -> None:
    shards = dp if zero1 else 1
    every = [runs_of(tp, shards, t, d % shards) for d in range(dp) for t in range(tp)]
    tables = [LeafTable(every, rank) for rank in range(len(every))]
    alone = LeafTable([runs_of(1, 1, 0, 0)], 0)
    assert all(table.names == alone.names for table in tables)
    values = {name: 7 * i + 3 for i, name in enumerate(alone.names)}
    rows = gathered(every, values)
    for table in tables:
        assert table.sort(rows).flatten().tolist() == [*values.values()]
        table.check_replicas(rows, "main")
    owned = [
        name
        for table, runs in zip(tables, every, strict=True)
        for run, mine in zip(runs, table.owned, strict=True)
        if mine
        for name in run.names()
    ]
    assert sorted(owned) == sorted(alone.names)


def test_a_replica_that_differs_is_named() -> None:
    every = [runs_of(2, 1, t, 0) for t in range(2)]
    table = LeafTable(every, 0)
    rows = gathered(every, dict.fromkeys(table.names, 5))
    last = NUM_PARTS // 2 * NUM_SLICES + 3
    rows[1, last] += 1
    with pytest.raises(ReplicasDiffer, match=r"main of whole\.block0\.slice3 .* ranks 0 and 1 \(1"):
        table.check_replicas(rows, "main")


def test_a_leaf_on_no_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cut\.block0\.slice0 is on none of 1 ranks"):
        LeafTable([[LeafRun("cut", NUM_PARTS, range(1, NUM_PARTS), ALL)]], 0)
