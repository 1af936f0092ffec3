"""The CUDA collectives, emulated: bits of primitives.reference, no race, bounded failure.

Nothing here runs on a GPU. The device code (csrc/collectives/cuda) is compiled for the host;
tests/emulator/races.hpp says what is watched. ``PRIMITIVES_PROPERTY_CASES`` as elsewhere.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from device_collective_cases import CHECKS, assert_series, check_cases, series
from emulated_ranks import (
    FOUND_AS,
    DeviceCodeWrong,
    Failure,
    Machine,
    RankCall,
    check_found,
    library,
    misaligned,
    outcome,
    play,
)

from primitives import env

NUM_CASES = int(env.PROPERTY_CASES.get())


@pytest.mark.parametrize("op", CHECKS)
def test_random_calls(op: str) -> None:
    check_cases(op, play, NUM_CASES)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_calls_one_after_the_other_share_the_staging(world_size: int, seed: int) -> None:
    machine = Machine(world_size, seed=seed, slot_nbytes=256, one_shot_nbytes=300)
    calls, wants = series(machine, 15)
    assert play(machine, calls) == [None] * world_size
    assert_series(calls, wants, 15)


def failures(machine: Machine, num_calls: int = 10, aborting: Any = ()) -> list[Failure]:
    """Of ``series``; every rank that lives must report one."""
    calls, _ = series(machine, num_calls)
    found = play(machine, calls, aborting)
    alive = [f for r, f in enumerate(found) if r != machine.dead_rank]
    assert None not in alive
    return [f for f in alive if f is not None]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_dead_rank_is_named_by_all_others(world_size: int) -> None:
    machine = Machine(world_size, dead_rank=1, dead_from=6, timeout_ns=10**8)
    found = failures(machine)
    for failure in found:
        assert failure.failure in ("timeout", "told")
        assert (failure.op, failure.seq, failure.missing) == ("all_gather", 6, [1])
    assert any(f.failure == "timeout" for f in found)


def test_a_rank_that_calls_something_else_is_a_mismatch() -> None:
    x = torch.ones(100)
    sides = [RankCall("all_reduce", torch.float32, [x.clone()], [x.clone()], "sum")] * 3
    others = {
        "op": RankCall("broadcast", torch.float32, [x], [x.clone()], root=0),
        "dtype": RankCall("all_reduce", torch.int32, [x.int()], [x.int()], "sum"),
        "reduce_op": replace(sides[0], reduce_op="max"),
        "numel": RankCall("all_reduce", torch.float32, [x[:99]], [x[:99].clone()], "sum"),
        "factor": replace(sides[0], reduce_op="avg", factor=2.0),
    }
    for what, other in others.items():
        found = play(Machine(4), [[sides[0]], [sides[1]], [other], [sides[2]]])
        mismatches = [f for f in found if f is not None and f.failure == "mismatch"]
        assert all(f is not None for f in found), what
        assert mismatches, what
        for failure in mismatches:
            assert 2 in (failure.rank, failure.peer), what
            assert failure.mine[:3] != failure.theirs[:3], what


def test_parts_that_do_not_fit_are_a_mismatch() -> None:
    x, y = torch.ones(100), torch.ones(60)
    calls = [
        RankCall("all_gather", ins=[x, x], outs=[x.clone(), y.clone()], has_counts=True),
        RankCall("all_gather", ins=[x, x], outs=[x.clone(), x.clone()], has_counts=True),
    ]
    found = play(Machine(2, max_blocks=1), [[c, RankCall("barrier")] for c in calls])
    assert found[0] is not None
    assert (found[0].failure, found[0].peer) == ("mismatch", 1)
    assert found[1] is not None  # at the latest in the next call
    assert (found[1].failure, found[1].rank) == ("told", 0)


def test_the_host_ends_a_wait() -> None:
    machine = Machine(3, dead_rank=2, dead_from=0, timeout_ns=10**15)
    found = failures(machine, aborting=[0])
    assert found[0].failure == "aborted"
    assert (found[1].failure, found[1].rank) == ("told", 0)


def test_a_grid_that_fits_never_waits_for_room() -> None:
    """The bound of primitives_cuda_max_blocks; twice as many blocks do wait for ever."""
    room = 8
    max_blocks = library().emulated_max_blocks(room, 4, 1)
    assert max_blocks == 2
    machine = Machine(4, max_blocks=max_blocks, room=room, timeout_ns=10**7)
    for seed in range(5):
        calls, wants = series(replace(machine, seed=seed), 5)
        assert play(replace(machine, seed=seed), calls) == [None] * 4
        assert_series(calls, wants, 5)
    stuck = [replace(machine, max_blocks=4, room=6, seed=seed) for seed in range(5)]
    assert any(None not in play(m, series(m, 5)[0]) for m in stuck)


@pytest.mark.parametrize(("mistake", "expected"), FOUND_AS)
def test_a_mistake_is_found(mistake: str, expected: set[str]) -> None:
    """One flag, barrier or index that goes wrong, at many places of a series of calls."""

    def played(machine: Machine) -> str:
        calls, wants = series(machine, 10)
        return outcome(machine, calls, lambda: assert_series(calls, wants, 10))

    places = range(3, 300, 19)
    wrong = [Machine(3, mistake=mistake, mistake_at=at, timeout_ns=10**7, seed=at) for at in places]
    assert played(Machine(3)) == "right"
    check_found([played(machine) for machine in wrong], expected)


def test_calls_that_make_no_sense_are_refused() -> None:
    x = torch.ones(8)
    for call, message in [
        (RankCall("all_reduce", torch.float32, [x], [x], "band"), "reduce_op"),
        (RankCall("all_reduce", torch.float32, [misaligned(x, 2)], [x], "sum"), "whole elements"),
        (RankCall("broadcast", torch.float32, [x], [x], root=2), "root"),
        (RankCall("all_gather", torch.float32, [x, x], [x, x[:4]]), "out_nbytes"),
        (RankCall("reduce_scatter", torch.float32, [x, x[:4]], [x], "sum"), "equal size"),
    ]:
        with pytest.raises(DeviceCodeWrong, match=message):
            play(Machine(2), [[call], [call]])
