"""The lockstep plugin with ranks that pytest forks: how they end, and what it refuses."""

import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest
from lockstep_jobs import LAUNCHERS, LIMIT_S, NUM_RANKS, environment, play, texts


def test_a_forked_rank_that_dies_fails_its_test_only(tmp_path: Path) -> None:
    suite = """
import ctypes, os, signal, sys, threading, time, warnings
import pytest
import torch.distributed as dist

def test_ordinary():  # in the parent, and its thread is not in the ranks that are forked later
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    os.environ["PARENT"] = str(os.getpid())

@pytest.fixture(scope="module")
def process(rank):
    yield os.getpid()
    if rank == 1:
        raise OSError("cannot tear down")

def test_segv(world, rank):
    print(f"printed by rank {rank}")
    if rank == 2:
        ctypes.string_at(0)
    dist.barrier()

def test_exit(world, rank):
    if rank == 0:
        os._exit(7)
    dist.barrier()

def test_kill(world, rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()

def test_ranks_live_on(world, rank, process, tmp_path):
    assert "PARENT" not in os.environ
    assert threading.active_count() <= 3
    assert tmp_path.parent.name == f"rank_{rank}"
    warnings.warn("be warned")

def test_in_the_same_process(world, rank, process):
    assert process == os.getpid()
    dist.barrier()

def test_hang(world, rank):
    if rank == 1:
        sys.setswitchinterval(1000)  # never gives another thread a turn
    while rank == 1:
        pass
    dist.barrier()

def test_fail(world, process, rank):
    assert process == os.getpid()
    assert rank != 2

def test_last(world, rank):
    dist.barrier()
"""
    arguments = ["-rA", "--ranks-limit-s=2", "--ranks-timeout-s=4", "--junitxml=junit.xml"]
    session = play(tmp_path, "forked", suite, *arguments)
    assert session.returncode == 1, session.text
    for name in ("ordinary", "ranks_live_on", "in_the_same_process", "last"):
        assert f"PASSED test_suite.py::test_{name}" in session.text
    report = xml.etree.ElementTree.parse(tmp_path / "junit.xml")
    text = texts(report)
    for name, *expected in (
        ("segv", "rank 2 was killed by SIGSEGV", "printed by rank 2", "in string_at", "in test_se"),
        ("exit", "lost in the call of test_suite.py::test_exit", "rank 0 exited with code 7"),
        ("kill", "rank 1 was killed by SIGKILL"),
        ("hang", "rank 1", "in test_hang"),
        ("fail", "failed on rank 2 of 3", "tearing down what outlives", "OSError: cannot tear"),
    ):
        for part in expected:
            assert part in text[name], f"{name}: {part} in {text[name]}"
    assert "UserWarning: be warned" in session.text
    assert "5 failed, 4 passed, 1 warning, 1 error" in session.text


def test_options_of_pytest_work_with_forked_ranks(tmp_path: Path) -> None:
    suite = """
def test_good(rank): print("said aloud")

def test_bad(rank): assert rank != 1

def test_ugly(rank): assert rank != 2
"""
    first = play(tmp_path, "forked", suite, "-x", "-s", "--ranks-backend=gloo")
    assert "1 failed, 1 passed" in first.text
    assert first.text.count("said aloud") == NUM_RANKS
    again = play(tmp_path, "forked", suite, "--lf", "-k", "bad or good", "--durations=1")
    assert "1 failed, 1 deselected" in again.text or "1 failed, 2 deselected" in again.text
    assert "slowest" in again.text


def test_examples_shrink_on_gloo_too(tmp_path: Path) -> None:
    suite = """
import hypothesis.strategies as st
import torch
import torch.distributed as dist
from hypothesis import given

@given(numel=st.integers(0, 10000))
def test_wrong_from_17_on_rank_2(world, rank, numel):
    tensor = torch.ones(numel)
    dist.all_reduce(tensor)
    assert rank != 2 or numel < 17
"""
    session = play(tmp_path, "forked", suite, "--ranks-backend=gloo")
    assert "failed on rank 2 of 3" in session.text
    assert session.text.count("numel=17,") == 1


def test_an_interrupt_ends_forked_ranks(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(
        """
import os, pathlib, time

def test_sleep(world, rank):
    pathlib.Path(f"pid_{rank}").write_text(str(os.getpid()))
    time.sleep(60)
"""
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    process = subprocess.Popen(
        [*LAUNCHERS["forked"], "-p", "primitives.lockstep", "test_suite.py"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        pids = [wait_for_pid(tmp_path / f"pid_{rank}") for rank in range(NUM_RANKS)]
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, text
    assert "KeyboardInterrupt" in text
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def wait_for_pid(path: Path) -> int:
    deadline = time.monotonic() + LIMIT_S
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.05)
    return int(path.read_text())


def test_threads_at_the_fork_are_refused(tmp_path: Path) -> None:
    suite = """
import threading, time

threading.Thread(target=time.sleep, args=(60,), name="early bird", daemon=True).start()

def test_any(rank): pass
"""
    session = play(tmp_path, "forked", suite)
    assert session.returncode == pytest.ExitCode.USAGE_ERROR
    assert "importing the tests started threads (['early bird'])" in session.text


def test_without_ranks_it_says_how_to_run(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text("def test_on_ranks(rank): pass")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "primitives.lockstep", "test_suite.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_suite.py::test_on_ranks runs on several ranks" in result.stderr
    assert "pytest --ranks 4" in result.stderr
    assert "Traceback" not in result.stderr
