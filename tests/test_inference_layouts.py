"""Tokens, log-probabilities and digests of logits are the same bits in every layout."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine_ranks import play_cases
from tests.inference_cases import make_engine, run_all, small_model
from tests.inference_ranks import BUGS, LAYOUTS, NUM_RANKS, NUM_REQUESTS, REQUESTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    engine = make_engine(small_model(folder / "model"))
    return run_all(engine, REQUESTS).as_json()


@pytest.fixture(scope="module")
def played(folder: Path, expected: Any) -> dict[str, Any]:
    """Results by case, the replicas' put together."""
    together: dict[str, Any] = {}
    for name, results in play_cases("tests.inference_ranks", NUM_RANKS, folder).items():
        case = together.setdefault(name.partition(" of ")[0], {})
        for kind, by_request in results.items():
            case.setdefault(kind, {}).update(by_request)
    return together


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits(played: dict[str, Any], expected: Any, layout: str) -> None:
    assert len(expected["tokens"]) == NUM_REQUESTS
    assert {*expected["reasons"].values()} == {"length", "stop"}
    assert played[layout] == expected


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_shows(played: dict[str, Any], expected: Any, bug: str) -> None:
    assert played[bug] != expected
