"""The fused CUDA collectives, emulated: bits of the definition, no race, bounded failure.

As test_collective_emulator.py, and not on a GPU either.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from device_collective_cases import machines
from device_fused_cases import (
    CAST,
    CASTS,
    FusedCall,
    assert_fused_series,
    check_all_gather_many,
    check_reduce_scatter_many,
    fused_series,
    gradients,
)
from emulated_ranks import FOUND_AS, DeviceCodeWrong, Failure, Machine, check_found, outcome, play
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import ThreadRanks
from torch import Tensor

from primitives import env

NUM_CASES = int(env.PROPERTY_CASES.get())


def share(percent: int, **strategies: Any) -> Any:
    """A property test that plays this share of all cases."""
    limits = settings(
        max_examples=max(10, NUM_CASES * percent // 100),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return lambda test: limits(given(**strategies)(test))


@share(20, machine=machines(), cast=st.sampled_from(CASTS), data=st.data())
def test_all_gather(machine: Machine, cast: Any, data: st.DataObject) -> None:
    check_all_gather_many(play, machine, cast, data)


@share(30, machine=machines(), dtype=st.sampled_from(CAST), data=st.data())
def test_reduce_scatter(machine: Machine, dtype: torch.dtype, data: st.DataObject) -> None:
    check_reduce_scatter_many(play, machine, dtype, data)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_tree_of_squares_goes_on_above_a_group(world_size: int) -> None:
    """A group has 65536 elements; a sum in turn, or by blocks, would have other bits."""
    cut = [[70_001] + [17] * (world_size - 1), [3] * world_size, [65_536] + [0] * (world_size - 1)]
    machine = Machine(world_size, num_lanes=32, max_blocks=4, slot_nbytes=1 << 16)
    grads = gradients(cut, torch.bfloat16, 5, 1 / 3, accumulate=False)
    calls = grads.calls(squares=True)
    assert play(machine, [[call] for call in calls]) == [None] * world_size
    for rank, call in enumerate(calls):
        grads.check(rank, call)


@pytest.mark.parametrize(("source", "target"), [c for c in CASTS if c[0] != c[1]])
def test_casts_have_the_bits_of_the_cpu(source: torch.dtype, target: torch.dtype) -> None:
    """Every pattern of 16 bits, and those of float32 around every rounding; every bit of a NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int64)
    if source == torch.float32:
        tails = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001])
        whole = ((bits[::7, None] << 16) | tails).flatten().to(torch.int32).view(source)
    else:
        whole = bits.to(torch.int16).view(source)
    cut = [[whole.numel()]]
    got, want = (torch.zeros(whole.numel(), dtype=target) for _ in range(2))
    call = FusedCall("fused all_gather", ins=[whole.clone()], outs=[got], cut=cut)
    assert play(Machine(1, num_lanes=32), [[call]]) == [None]
    ranks = ThreadRanks(1)
    ranks(lambda backend, _: backend.all_gather_many([whole], [want], cut[0], False).wait())
    ranks.close()
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_calls_one_after_the_other(world_size: int) -> None:
    machine = Machine(world_size, slot_nbytes=256, seed=world_size)
    calls, wants = fused_series(world_size, 8)
    assert play(machine, calls) == [None] * world_size
    assert_fused_series(calls, wants)


def test_a_dead_rank_is_named_by_all_others() -> None:
    machine = Machine(4, dead_rank=1, dead_from=2, timeout_ns=10**8)
    found = play(machine, fused_series(4, 4)[0])
    for rank, failure in enumerate(found):
        if rank == 1:
            continue
        assert failure is not None
        assert failure.failure in ("timeout", "told")
        assert (failure.op, failure.seq, failure.missing) == ("fused reduce_scatter", 2, [1])


def sides(cut: list[list[int]], accumulate: bool = False, **change: Any) -> list[FusedCall]:
    grads = gradients(cut, torch.float32, 1, 1.0, accumulate)
    return [replace(call, **change) for call in grads.calls(squares=False)]


def test_lists_that_differ_between_ranks_are_a_mismatch() -> None:
    cut = [[30, 30, 40], [1, 2, 3]]
    gathers = [
        FusedCall(
            "fused all_gather",
            ins=[torch.ones(c[r]) for c in cut],
            outs=[torch.ones(sum(c)) for c in cut],
            rank=r,
            cut=cut,
        )
        for r in range(3)
    ]
    others = {
        "cut": sides([[30, 40, 30], [1, 2, 3]]),
        "order": sides(cut[::-1]),
        "tensors": sides([*cut, [0, 0, 0]]),
        "factor": sides(cut, factor=0.5),
        "accumulate": sides(cut, accumulate=True),
        "dtype": gradients(cut, torch.bfloat16, 1, 1.0, False).calls(squares=False),
        "op": gathers,
    }
    for what, other in others.items():
        found = play(Machine(3), [[c] for c in (*sides(cut)[:2], other[2])])
        assert all(f is not None for f in found), what
        mismatches: list[Failure] = [f for f in found if f is not None and f.failure == "mismatch"]
        assert mismatches, what
        for failure in mismatches:
            assert 2 in (failure.rank, failure.peer), what
            assert failure.mine[:3] != failure.theirs[:3], what


@pytest.mark.parametrize(("mistake", "expected"), FOUND_AS)
def test_a_mistake_is_found(mistake: str, expected: set[str]) -> None:
    """One flag, barrier or index that goes wrong, at many places of a series of calls."""

    def played(machine: Machine) -> str:
        calls, wants = fused_series(machine.world_size, 4)
        return outcome(machine, calls, lambda: assert_fused_series(calls, wants))

    places = range(1, 120, 11)
    wrong = [Machine(2, mistake=mistake, mistake_at=at, timeout_ns=10**7, seed=at) for at in places]
    assert played(Machine(2)) == "right"
    check_found([played(machine) for machine in wrong], expected)


def test_calls_that_make_no_sense_are_refused() -> None:
    def call(op: str, source: torch.dtype, target: torch.dtype, **change: Any) -> FusedCall:
        ins: list[Tensor] = [torch.ones(8, dtype=source)]
        return FusedCall(op, source, ins, [torch.ones(8, dtype=target)], cut=[[8]], **change)

    def offered(num_tensors: int) -> FusedCall:
        heap = torch.zeros(1024, dtype=torch.uint8)
        ins, outs = ([torch.zeros(0)] * num_tensors for _ in range(2))
        ins[-1], outs[-1] = heap[:512].view(torch.float32), torch.zeros(128)
        cut = [[len(x)] for x in ins]
        return FusedCall("fused all_gather", ins=ins, outs=outs, cut=cut, heap=heap)

    fits, small = Machine(1, slot_nbytes=256, direct_nbytes=512), Machine(1, direct_nbytes=513)
    assert play(fits, [[offered(32)]]) == [None]
    for machine, num_tensors in ((small, 1), (fits, 33)):  # 33 places have more than 256 bytes
        with pytest.raises(DeviceCodeWrong, match="place: expected none for a fused call that is"):
            play(machine, [[offered(num_tensors)]])
    for wrong, message in [
        (call("fused all_gather", torch.int32, torch.float32), "from, to"),
        (call("fused reduce_scatter", torch.int32, torch.float32, reduce_op="sum"), "dtype"),
    ]:
        with pytest.raises(DeviceCodeWrong, match=message):
            play(Machine(1), [[wrong]])
