"""The CUDA collectives on one GPU, ranks as streams: the bits of the CPU, and bounded failure."""

from typing import Any

import pytest
import torch
from device_collective_cases import (
    MOVED,
    REDUCED,
    assert_series,
    check_all_gather,
    check_all_reduce,
    check_all_to_all,
    check_broadcast,
    check_gather_scatter,
    check_reduce,
    check_reduce_scatter,
    machines,
    series,
)
from emulated_ranks import Machine
from gpu_ranks import play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from primitives.env import PROPERTY_CASES

NUM_CASES = max(1000, int(PROPERTY_CASES.get()))
FULL_SIZE = {"slot_nbytes": 64 << 10, "block_nbytes": 16 << 10, "one_shot_nbytes": 256 << 10}
"""The sizes that PRIMITIVES_CUDA_SLOT_NBYTES and its like begin with."""


def share(percent: int, **strategies: Any) -> Any:
    """A property test that plays this share of all cases."""
    limits = settings(
        max_examples=NUM_CASES * percent // 100,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return lambda test: limits(given(**strategies)(test))


@share(30, machine=machines(), reduced=st.sampled_from(REDUCED), data=st.data())
def test_all_reduce(machine: Machine, reduced: Any, data: st.DataObject) -> None:
    check_all_reduce(play, machine, reduced, data)


@share(25, machine=machines(), reduced=st.sampled_from(REDUCED), data=st.data())
def test_reduce_scatter(machine: Machine, reduced: Any, data: st.DataObject) -> None:
    check_reduce_scatter(play, machine, reduced, data)


@share(20, machine=machines(), dtype=st.sampled_from(MOVED), data=st.data())
def test_all_gather(machine: Machine, dtype: torch.dtype, data: st.DataObject) -> None:
    check_all_gather(play, machine, dtype, data)


@share(10, machine=machines(), dtype=st.sampled_from(MOVED), data=st.data())
def test_all_to_all(machine: Machine, dtype: torch.dtype, data: st.DataObject) -> None:
    check_all_to_all(play, machine, dtype, data)


@share(5, machine=machines(), dtype=st.sampled_from(MOVED), data=st.data())
def test_broadcast(machine: Machine, dtype: torch.dtype, data: st.DataObject) -> None:
    check_broadcast(play, machine, dtype, data)


@share(5, machine=machines(), reduced=st.sampled_from(REDUCED), data=st.data())
def test_reduce(machine: Machine, reduced: Any, data: st.DataObject) -> None:
    check_reduce(play, machine, reduced, data)


@share(5, machine=machines(), dtype=st.sampled_from(MOVED), data=st.data())
def test_gather_scatter(machine: Machine, dtype: torch.dtype, data: st.DataObject) -> None:
    check_gather_scatter(play, machine, dtype, data)


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
