"""One training run, bit for bit, in every layout, bucket size, flag and resume point."""

import itertools

import pytest

from tests.engine_ranks import (
    BUGS,
    LAYOUTS,
    NUM_RANKS,
    SAVED,
    SAVED_AT,
    Metrics,
    play_cases,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Metrics]:
    """All cases of engine_ranks, by name."""
    folder = tmp_path_factory.mktemp("engine")
    return play_cases("tests.engine_ranks", NUM_RANKS, folder)


def test_the_run_is_worth_comparing(runs: dict[str, Metrics]) -> None:
    *steps, _ = runs["dp1"]
    skipped = [step for step in steps if step["grad-norm"] is None]
    trained = [step for step in steps if step["grad-norm"] is not None]
    assert skipped, "the loss scale never overflowed"
    assert all(step["num-zeros"] is None for step in skipped)
    assert len({step["params-digest"] for step in steps}) >= 3
    assert len({step["learning-rate"] for step in trained}) == len(trained)
    scales = [step["loss-scale"] for step in steps]
    assert min(scales) < scales[0]


@pytest.mark.parametrize("other", [*LAYOUTS[1:], "no overlap, one bucket per parameter"])
def test_layout_changes_no_bit(runs: dict[str, Metrics], other: str) -> None:
    """Of any metric, and at the end of parameters and moments."""
    assert runs[other] == runs["dp1"]


@pytest.mark.parametrize("layout", ["dp4", "pp4"])
def test_few_microbatches_change_no_bit(runs: dict[str, Metrics], layout: str) -> None:
    """One for each replica; as many as stages."""
    assert runs[f"{layout} of 4 microbatches"] == runs["dp1 of 4 microbatches"]


def test_fewer_microbatches_than_stages_change_no_bit(runs: dict[str, Metrics]) -> None:
    assert runs["tp2,pp4,sp of 1 microbatch"] == runs["dp1 of 1 microbatch"]


@pytest.mark.parametrize(("saved", "resumed"), [*itertools.permutations(SAVED, 2)])
def test_resume_in_another_layout_changes_no_bit(
    runs: dict[str, Metrics], saved: str, resumed: str
) -> None:
    assert runs[f"{saved} resumed at {resumed}"] == runs["dp1"][SAVED_AT:]


@pytest.mark.parametrize("bug", BUGS)
def test_comparison_sees_a_bug(runs: dict[str, Metrics], bug: str) -> None:
    """The same comparison on a broken engine: it must fail, or replicas must be seen to differ."""
    if "error" in runs[bug][0]:
        assert "main of " in runs[bug][0]["error"]
        return
    digests = [step["params-digest"] for step in runs[bug][:-1]]
    assert digests != [step["params-digest"] for step in runs["dp1"][:-1]]
