"""Collectives of Python values."""

import pytest
import torch.distributed as dist

from primitives.collectives import all_gather_dict


def test_all_gather_dict(world: dist.ProcessGroup, rank: int) -> None:
    metrics = {
        "loss": [1.5 + rank, float(rank)],
        "step": 7,
        "rank": rank,
        "names": [f"rank {rank}"] * rank,  # another length on every rank
        "nested": {"value": (rank, None)},
    }
    assert all_gather_dict(metrics) == {
        "loss": [[1.5, 0.0], [2.5, 1.0], [3.5, 2.0], [4.5, 3.0]],
        "step": [7, 7, 7, 7],
        "rank": [0, 1, 2, 3],
        "names": [[], ["rank 1"], ["rank 2"] * 2, ["rank 3"] * 3],
        "nested": [{"value": (r, None)} for r in range(4)],
    }


def test_all_gather_dict_of_a_subgroup(world: dist.ProcessGroup, rank: int) -> None:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    gathered = all_gather_dict({"rank": rank}, groups[rank % 2])
    assert gathered == {"rank": [rank % 2, rank % 2 + 2]}


def test_all_gather_dict_names_rank_and_key(world: dist.ProcessGroup, rank: int) -> None:
    metrics = {"loss": 1.0, "grad-norm" if rank != 2 else "grad_norm": 2.0}
    with pytest.raises(ValueError, match="rank 2 lacks grad-norm; rank 2 also has grad_norm"):
        all_gather_dict(metrics)
    assert all_gather_dict({"next": rank}) == {"next": [0, 1, 2, 3]}  # the group goes on
