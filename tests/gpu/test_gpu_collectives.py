"""The CUDA collectives on one GPU, ranks as streams: the bits of the CPU, and bounded failure."""

import pytest
import torch
from device_collective_cases import CHECKS, assert_series, check_cases, series
from emulated_ranks import Machine
from gpu_ranks import play

from primitives.env import PROPERTY_CASES

NUM_CASES = max(1000, int(PROPERTY_CASES.get()))
FULL_SIZE = {"slot_nbytes": 64 << 10, "block_nbytes": 16 << 10, "one_shot_nbytes": 256 << 10}
"""The sizes that PRIMITIVES_CUDA_SLOT_NBYTES and its like begin with."""


@pytest.mark.parametrize("op", CHECKS)
def test_random_calls(op: str) -> None:
    check_cases(op, play, NUM_CASES)


@pytest.mark.sanitize
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_one_after_the_other(world_size: int, dtype: torch.dtype) -> None:
    machine = Machine(world_size, slot_nbytes=256, one_shot_nbytes=300)
    calls, wants = series(machine, 15, dtype)
    assert play(machine, calls) == [None] * world_size
    assert_series(calls, wants, 15)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_large_calls_with_the_default_sizes(world_size: int) -> None:
    machine = Machine(world_size, max_blocks=16, **FULL_SIZE)
    calls, wants = series(machine, 5, scale=5000)
    assert play(machine, calls) == [None] * world_size
    assert_series(calls, wants, 5)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_rank_that_does_not_come_is_named_within_the_deadline(world_size: int) -> None:
    machine = Machine(world_size, dead_rank=1, dead_from=6, timeout_ns=2 * 10**9)
    found = play(machine, series(machine, 10)[0])
    for rank, failure in enumerate(found):
        if rank == machine.dead_rank:
            continue
        assert failure is not None
        assert failure.failure in ("timeout", "told")
        assert (failure.op, failure.seq, failure.missing) == ("all_gather", 6, [1])


def test_the_host_ends_a_wait() -> None:
    machine = Machine(3, dead_rank=2, dead_from=0, timeout_ns=10**11)
    found = play(machine, series(machine, 2)[0], aborting=[0])
    assert found[0] is not None
    assert found[1] is not None
    assert (found[0].failure, found[1].failure) == ("aborted", "told")
