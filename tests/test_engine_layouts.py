"""One training run, bit for bit: any data-parallel size, bucket size, flags and resume point."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine_ranks import BUGS, WORLD_SIZE

ROOT = Path(__file__).parent.parent
Metrics = list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Metrics]:
    """All cases of engine_ranks, by name."""
    folder = tmp_path_factory.mktemp("engine")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(WORLD_SIZE):
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, "-m", "tests.engine_ranks", str(folder), str(rank)]
            ranks.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        codes = [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = "\n".join((folder / f"rank{rank}.log").read_text() for rank in range(WORLD_SIZE))
    assert codes == [0] * WORLD_SIZE, logs
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_the_run_is_worth_comparing(runs: dict[str, Metrics]) -> None:
    steps = runs["dp4"]
    skipped = [step for step in steps if step["grad-norm"] is None]
    trained = [step for step in steps if step["grad-norm"] is not None]
    assert skipped, "the loss scale never overflowed"
    assert all(step["num-zeros"] is None for step in skipped)
    assert len({step["params-digest"] for step in steps}) >= 3
    assert len({step["learning-rate"] for step in trained}) == len(trained)
    scales = [step["loss-scale"] for step in steps]
    assert min(scales) < scales[0]


@pytest.mark.parametrize("other", ["dp1", "dp2", "dp4 no overlap, one bucket per parameter"])
def test_layout_changes_no_bit(runs: dict[str, Metrics], other: str) -> None:
    assert runs[other] == runs["dp4"]


def test_one_microbatch_a_rank_changes_no_bit(runs: dict[str, Metrics]) -> None:
    assert runs["dp4 of one microbatch"] == runs["dp1 of four microbatches"]


@pytest.mark.parametrize("resumed", ["dp4 resumed at dp1", "dp4 resumed at dp2"])
def test_resume_changes_no_bit(runs: dict[str, Metrics], resumed: str) -> None:
    assert runs[resumed] == runs["dp4"][3:]


@pytest.mark.parametrize("bug", BUGS)
def test_comparison_sees_a_bug(runs: dict[str, Metrics], bug: str) -> None:
    """The same comparison on a broken engine: it must fail."""
    digests = [step["params-digest"] for step in runs[bug]]
    assert digests != [step["params-digest"] for step in runs["dp4"]]
    assert runs[bug] != runs["dp4"]
