"""The fused CUDA collectives on one GPU, ranks as streams: the bits of the definition."""

from typing import Any

import pytest
import torch
from device_collective_cases import machines
from device_fused_cases import (
    CAST,
    CASTS,
    assert_fused_series,
    check_all_gather_many,
    check_reduce_scatter_many,
    fused_series,
    gradients,
)
from emulated_ranks import Machine
from gpu_ranks import play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from primitives.env import PROPERTY_CASES

NUM_CASES = max(1000, int(PROPERTY_CASES.get()))
LIMITS = settings(
    max_examples=NUM_CASES // 2, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@LIMITS
@given(machine=machines(), cast=st.sampled_from(CASTS), data=st.data())
def test_all_gather(machine: Machine, cast: Any, data: st.DataObject) -> None:
    check_all_gather_many(play, machine, cast, data)


@LIMITS
@given(machine=machines(), dtype=st.sampled_from(CAST), data=st.data())
def test_reduce_scatter(machine: Machine, dtype: torch.dtype, data: st.DataObject) -> None:
    check_reduce_scatter_many(play, machine, dtype, data)


@pytest.mark.sanitize
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_calls_one_after_the_other(world_size: int) -> None:
    calls, wants = fused_series(world_size, 8)
    assert play(Machine(world_size, slot_nbytes=256), calls) == [None] * world_size
    assert_fused_series(calls, wants)


@pytest.mark.parametrize("dtype", CAST)
def test_large_tensors_with_the_default_sizes(dtype: torch.dtype) -> None:
    """The sizes that PRIMITIVES_CUDA_SLOT_NBYTES and its like begin with; several groups."""
    n = 4
    cut = [[300_000 + 17 * r for r in range(n)], [5] * n, [1_000_000] + [0] * (n - 1)]
    machine = Machine(n, max_blocks=16, slot_nbytes=64 << 10, block_nbytes=16 << 10)
    grads = gradients(cut, dtype, 3, 0.25, accumulate=True)
    calls = grads.calls(squares=True)
    assert play(machine, [[call] for call in calls]) == [None] * n
    for rank, call in enumerate(calls):
        grads.check(rank, call)
