"""A model with experts, bit for bit, in every layout and resume point."""

import itertools

import pytest

from tests.engine_ranks import SAVED_AT, Metrics, play_cases
from tests.moe_ranks import BUGS, LAYOUTS, NUM_RANKS, SAVED


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Metrics]:
    """All cases of moe_ranks, by name."""
    folder = tmp_path_factory.mktemp("moe")
    return play_cases("tests.moe_ranks", NUM_RANKS, folder)


def test_the_run_is_worth_comparing(runs: dict[str, Metrics]) -> None:
    *steps, _ = runs["dp1"]
    assert len({step["params-digest"] for step in steps}) >= 3
    assert len({step["aux loss"] for step in steps}) == len(steps)
    assert steps[-1]["lm loss"] < steps[0]["lm loss"]


@pytest.mark.parametrize("other", [*LAYOUTS[1:], "one bucket per parameter"])
def test_layout_changes_no_bit(runs: dict[str, Metrics], other: str) -> None:
    """Of any metric, and at the end of parameters and moments."""
    assert runs[other] == runs["dp1"]


@pytest.mark.parametrize(("saved", "resumed"), [*itertools.permutations(SAVED, 2)])
def test_resume_in_another_layout_changes_no_bit(
    runs: dict[str, Metrics], saved: str, resumed: str
) -> None:
    assert runs[f"{saved} resumed at {resumed}"] == runs["dp1"][SAVED_AT:]


@pytest.mark.parametrize("bug", BUGS)
def test_comparison_sees_a_bug(runs: dict[str, Metrics], bug: str) -> None:
    """The same comparison on a broken model: it must fail, or the engine must have noticed."""
    if "error" in runs[bug][0]:
        assert "differs between ranks" in runs[bug][0]["error"]
        return
    digests = [step["params-digest"] for step in runs[bug][:-1]]
    assert digests != [step["params-digest"] for step in runs["dp1"][:-1]]
