"""The judge of ``testbed faults`` lets nothing pass that is not as it must be."""

from dataclasses import replace

import pytest

from scenarios.cli import main
from scenarios.faults.catalogue import CATALOGUE, NUM_RANKS, Fault, select
from scenarios.faults.play import BOUND_S, Ending, Result, judge

FAULT = next(fault for fault in CATALOGUE if fault.id == "7")
TEXT = "rank 3 (pid 9), has left; rank 0 of group 'g' in barrier, collective 2 still needs it"
GOOD = [Ending(rank, "PeerLost", TEXT, 0.5) for rank in range(3)]
GOOD.append(Ending(3, "KeyError", "lost the way", 0.1))


def complaints(fault: Fault, *changed: Ending, leftovers: tuple[str, ...] = ()) -> list[str]:
    endings = {ending.rank: ending for ending in [*GOOD, *changed]}
    return list(judge(fault, list(endings.values()), leftovers))


def test_the_right_ending_passes() -> None:
    assert complaints(FAULT) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (replace(GOOD[1], error="CollectiveTimeout"), "rank 1: expected PeerLost, got Coll"),
        (replace(GOOD[1], error="returned"), "rank 1: expected PeerLost, got returned"),
        (replace(GOOD[1], error="hangs"), "rank 1: expected PeerLost, got hangs"),
        (replace(GOOD[3], error="PeerLost"), "rank 3: expected KeyError, got PeerLost"),
        (replace(GOOD[2], message="something"), "rank 2: expected 'rank 3' in: something"),
        (replace(GOOD[0], duration_s=BOUND_S + 1), "rank 0: ended after 11.0 s, more than 10"),
        (replace(GOOD[3], duration_s=BOUND_S + 1), "rank 3: ended after 11.0 s, more than 10"),
    ],
)
def test_another_ending_is_told(changed: Ending, words: str) -> None:
    told = complaints(FAULT, changed)
    assert words in told[0]
    assert not Result("7", "", (), (), tuple(told)).passed


def test_what_is_left_behind_is_told() -> None:
    assert complaints(FAULT, leftovers=("primitives-0-1",)) == ["left behind: primitives-0-1"]


def test_ids_select() -> None:
    assert [f.id for f in select(["8"])] == ["8"]
    assert {f.id for f in select(["10"])} == {"10-term", "10-int"}
    assert len({f.id for f in CATALOGUE}) == len(CATALOGUE) == len(select([]))
    covered = {int(f.id.split("-")[0]) for f in CATALOGUE}
    assert covered == {*range(1, 15), *range(16, 20)}
    for fault in CATALOGUE:
        assert all(rank < NUM_RANKS for rank in fault.victims)


def test_an_unknown_id_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", "--only", "77"]) == 2
    assert "no fault 77; there are 1, 1-root" in capsys.readouterr().err
