"""Checkpoints that another number of ranks, or another wrapper, goes on from."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from primitives.checkpoint import FSDPCheckpointManager
from special_distributed.checkpoint_runs import (
    FSDP1_WARNINGS,
    Wrap,
    assert_same_bits,
    ddp,
    fsdp1,
    fsdp2,
    hsdp,
    make_run,
    name_of,
    plain,
    reference_step,
)

pytestmark = FSDP1_WARNINGS

CHANGES: list[tuple[Wrap, int, Wrap, int]] = [
    (fsdp2, 4, fsdp2, 2),
    (fsdp2, 2, fsdp2, 4),
    (fsdp2, 4, fsdp2, 3),
    (fsdp2, 3, fsdp2, 4),
    (fsdp1, 4, fsdp1, 2),
    (fsdp1, 2, fsdp1, 4),
    (fsdp1, 4, fsdp1, 3),
    (fsdp1, 3, fsdp1, 2),
    (fsdp2, 4, fsdp1, 4),
    (fsdp1, 4, fsdp2, 4),
    (fsdp2, 4, fsdp1, 3),
    (fsdp1, 3, hsdp, 4),
    (hsdp, 4, fsdp2, 3),
    (hsdp, 4, fsdp1, 2),
    (ddp, 4, fsdp2, 3),
    (fsdp2, 3, ddp, 2),
    (fsdp1, 4, ddp, 4),
    (ddp, 2, fsdp1, 4),
    (fsdp2, 4, plain, 1),
    (plain, 1, fsdp1, 4),
    (plain, 1, ddp, 3),
]
if torch.__version__ < "2.13":  # test_fsdp1_on_some_ranks_before_torch_2_13
    CHANGES = [c for c in CHANGES if (fsdp1, True) not in ((c[0], c[1] < 4), (c[2], c[3] < 4))]


@pytest.mark.parametrize(("before", "num_before", "after", "num_after"), CHANGES, ids=name_of)
def test_change(
    before: Wrap,
    num_before: int,
    after: Wrap,
    num_after: int,
    folder: Path,
    rank: int,
) -> None:
    groups = {num: dist.new_group(list(range(num))) for num in sorted({1, num_before, num_after})}
    expected: dict[str, Any] = {}
    if rank < num_before:
        run = make_run(before, groups[num_before], seed=1)
        for seed in range(3):
            run.update(seed)
        expected = run.full(groups[num_before])
        manager = FSDPCheckpointManager(folder, *run, process_group=groups[num_before])
        manager.save(3, {"who": "before"})
    dist.barrier()
    if rank < num_after:
        run = make_run(after, groups[num_after], seed=2, swap=True)
        run.update(99)
        manager = FSDPCheckpointManager(folder, *run, process_group=groups[num_after])
        assert manager.load() == (3, {"who": "before"})
        assert manager.checkpoints.contents(3).values["tied"] == [
            {"head.weight": "embedding.weight"}
        ]
        got = run.full(groups[num_after])
        if rank == 0:
            assert ("unused" in expected["moments"]) == (before is fsdp1)  # which makes zeros
            assert_same_bits(got, expected)
        run.update(3)
        got = run.full(groups[num_after])
        if rank == 0:
            stepped = reference_step(expected, 3, groups[1])
            for state in (got, stepped):  # FSDP1 steps it with zeros
                state["moments"].pop("unused", None)
            torch.testing.assert_close(got, stepped, rtol=2e-6, atol=1e-7)
    dist.barrier()


def test_fsdp1_on_some_ranks_before_torch_2_13(
    folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = dist.new_group([0, 1, 2])
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    if rank < 3:
        run = make_run(fsdp1, group, seed=1)
        message = "FSDP1 with an optimizer on 3 of 4 ranks needs torch 2.13 or newer, got 2.12.1"
        with pytest.raises(ValueError, match=message):
            FSDPCheckpointManager(folder, *run, process_group=group)
        FSDPCheckpointManager(folder, run.model, process_group=group)
    run = make_run(fsdp1, dist.group.WORLD, seed=1)
    FSDPCheckpointManager(folder, *run)
