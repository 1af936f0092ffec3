"""Native arithmetic trains like canonical arithmetic, within tolerances that see real errors."""

import pytest

from scenarios.compare import Comparison
from scenarios.golden import Metrics as GoldenMetrics
from scenarios.golden import metrics_from_steps
from scenarios.tolerance import compare_golden
from tests.engine_ranks import Metrics, play_cases
from tests.engine_scenarios import tiny_scenario
from tests.native_ranks import FAMILIES, LAYOUTS, NUM_RANKS, SEEN, UNSEEN


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Metrics]:
    """All cases of native_ranks, by name."""
    return play_cases("tests.native_ranks", NUM_RANKS, tmp_path_factory.mktemp("native"))


def logged(run: Metrics) -> GoldenMetrics:
    """As a golden holds them; the last entry of a run is the digest of its state."""
    steps = [
        {name: "nan" if value is None else value for name, value in step.items()}
        for step in run[:-1]
    ]
    return metrics_from_steps(dict(enumerate(steps, 1)))


def near(runs: dict[str, Metrics], golden: str, actual: str) -> Comparison:
    family = golden.split()[0]
    scenario = tiny_scenario("dp1", **FAMILIES[family]).model_copy(update={"arithmetic": "native"})
    return compare_golden(scenario, logged(runs[golden]), logged(runs[actual]))


def test_the_same_run_again_is_the_same_bits(runs: dict[str, Metrics]) -> None:
    assert runs["gpt dp1"] == runs["gpt dp1 again"]


@pytest.mark.parametrize("family", FAMILIES)
def test_native_is_not_canonical(runs: dict[str, Metrics], family: str) -> None:
    """Else this file would test nothing."""
    assert runs[f"{family} dp1"] != runs[f"{family} canonical"]


@pytest.mark.parametrize(
    ("family", "other"),
    [(family, other) for family in FAMILIES for other in (*LAYOUTS[family], "canonical")],
)
def test_other_layouts_and_kernels_are_near(
    runs: dict[str, Metrics], family: str, other: str
) -> None:
    comparison = near(runs, f"{family} dp1", f"{family} {other}")
    assert comparison.passed, comparison.differences
    assert "within derived tolerances (the nearest, " in comparison.summary


@pytest.mark.parametrize("bug", SEEN)
def test_comparison_sees_a_bug(runs: dict[str, Metrics], bug: str) -> None:
    assert not near(runs, "gpt dp1", bug).passed


@pytest.mark.parametrize("bug", UNSEEN)
def test_comparison_misses_what_is_smaller_than_rounding(
    runs: dict[str, Metrics], bug: str
) -> None:
    """What docs/comparison.md admits; bit for bit these runs differ."""
    assert near(runs, "gpt dp1", bug).passed
    assert runs[bug] != runs["gpt dp1"]
