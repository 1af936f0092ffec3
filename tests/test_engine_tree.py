"""TreeAccumulator against the definition of the tree: any order, any aligned split over ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from primitives import canonical
from scenarios.parallel.tree import TreeAccumulator


def tree(values: list[torch.Tensor]) -> torch.Tensor:
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[0::2], values[1::2], strict=False)]
        values = pairs + values[len(values) - len(values) % 2 :]
    return values[0]


@st.composite
def leaves_in_any_order(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    count = draw(st.integers(1, 19))
    seed = draw(st.integers(0, 2**32))
    leaves = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    leaves *= torch.tensor([10.0 ** draw(st.integers(-6, 6)) for _ in range(count)])[:, None]
    return leaves, draw(st.permutations(range(count)))


@given(leaves_in_any_order())
def test_any_arrival_order_is_the_tree(case: tuple[torch.Tensor, list[int]]) -> None:
    leaves, order = case
    accumulator = TreeAccumulator(len(leaves))
    for leaf in order:
        accumulator.add(leaf, leaves[leaf].clone())
    assert accumulator.complete
    total = accumulator.take()
    assert total.tolist() == tree(list(leaves)).tolist()
    assert total.tolist() == canonical.tree_sum(leaves).tolist()


@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 2**32))
def test_ranks_hold_subtrees(levels_per_rank: int, levels_above: int, seed: int) -> None:
    per_rank, ranks = 2**levels_per_rank, 2**levels_above
    leaves = torch.randn(per_rank * ranks, 5, generator=torch.Generator().manual_seed(seed))
    partials = []
    for rank in range(ranks):
        accumulator = TreeAccumulator(len(leaves), rank * per_rank, per_rank)
        for leaf in range(rank * per_rank, (rank + 1) * per_rank):
            accumulator.add(leaf, leaves[leaf].clone())
            assert accumulator.num_partials <= levels_per_rank + 1
        partials.append(accumulator.take())
    assert tree(partials).tolist() == tree(list(leaves)).tolist()


def test_the_order_matters() -> None:
    """The property would hold for any code if fp32 addition were associative; it is not."""
    leaves = torch.tensor([1e8, 1.0, -1e8, 1.0])
    running = leaves[0] + leaves[1] + leaves[2] + leaves[3]
    accumulator = TreeAccumulator(4)
    for leaf in (3, 1, 0, 2):
        accumulator.add(leaf, leaves[leaf].clone())
    assert accumulator.take().item() == 0.0
    assert running.item() == 1.0


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="no subtree"):
        TreeAccumulator(12, 3, 3)
    with pytest.raises(ValueError, match="no subtree"):
        TreeAccumulator(8, 1, 2)
    with pytest.raises(ValueError, match="outside"):
        TreeAccumulator(4, 2, 4)
    accumulator = TreeAccumulator(8, 4, 2)
    with pytest.raises(ValueError, match="leaf 6"):
        accumulator.add(6, torch.zeros(1))
    accumulator.add(4, torch.zeros(1))
    with pytest.raises(ValueError, match="twice"):
        accumulator.add(4, torch.zeros(1))
    with pytest.raises(ValueError, match=r"\[5\] have not arrived"):
        accumulator.take()
