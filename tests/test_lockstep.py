"""The lockstep plugin: small suites on ranks started in every way, healthy and broken.

Each suite runs as a child job, so that a fault of ours cannot hide another.
"""

import xml.etree.ElementTree
from dataclasses import asdict
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from lockstep_jobs import LAUNCHERS, play, texts

from primitives.lockstep.outcome import Arrival, Outcome, causes, merge

# Every outcome in one session: each test must be judged alone, in spite of the ones before it.
MIXED_SUITE = """
import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings

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

@pytest.mark.xfail(reason="known")
def test_xfail_on_one_rank(world, rank):
    if rank == 2:
        raise KeyError("lost the way")
    dist.barrier()

@pytest.mark.xfail(reason="known", strict=True)
def test_xfail_that_passes(world, rank):
    dist.barrier()

@settings(max_examples=20)
@given(n=st.integers(0, 100))
def test_examples_pass(world, rank, n):
    assume(n != 50)
    assert total(rank + n) == 6 + 3 * n

@given(numel=st.integers(0, 10000))
def test_wrong_from_17_on_rank_2(world, rank, numel):
    tensor = torch.ones(numel)
    dist.all_reduce(tensor)
    if rank == 2 and numel >= 17:
        tensor[3] += 1
    assert (tensor == 3).all()

@pytest.fixture
def pair(world):
    return dist.new_group([0, 1, 2])  # of the process group that an example may break

@given(data=st.data(), steps=st.lists(st.integers(0, 5)))
def test_examples_fail_while_others_wait(pair, rank, data, steps):
    for step in steps:
        if step == 3 and rank == 1:
            raise KeyError("lost the way")
        dist.barrier(pair)

@given(n=st.integers(0, 10000))
def test_assume_on_one_rank(world, rank, n):
    if rank == 1:
        assume(n < 17)
    dist.barrier()

@given(data=st.data())
def test_draws_differ(world, rank, data):
    if data.draw(st.integers(0, 100)) > 50 and rank == 1:
        data.draw(st.booleans())

def test_last(world, rank):
    assert total(rank) == 6
"""


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
        "xfail_on_one_rank": "skipped",
        "xfail_that_passes": "failure",
        "examples_pass": "passed",
        "wrong_from_17_on_rank_2": "failure",
        "examples_fail_while_others_wait": "failure",
        "assume_on_one_rank": "failure",
        "draws_differ": "failure",
        "last": "passed",
    }
    text = texts(report)
    for name, *expected in (
        ("fail_on_one_rank", "failed on rank 1 of 3", "assert 6 == 5", "printed by rank 1"),
        (
            "raise_before_barrier",
            "failed on rank 2 of 3",
            "was freed: another rank had failed",
            "KeyError: 'lost the way'",
        ),
        ("setup_fails_on_rank_0", "failed on rank 0 of 3", "OSError: no such device"),
        ("skip_on_one_rank", "the ranks disagree", "rank 0: passed", "rank 1: skipped"),
        ("wrong_from_17_on_rank_2", "failed on rank 2 of 3", "numel=17,", "assert (tensor == 3)"),
        ("examples_fail_while_others_wait", "failed on rank 1 of 3", "steps=[3],", "KeyError"),
        ("assume_on_one_rank", "the ranks disagree about n=", "rank 1: rejected"),
        ("draws_differ", "the ranks drew different examples"),
    ):
        for part in expected:
            assert part in text[name], f"{name}: {part} in {text[name]}"
    assert "printed by rank 0" not in session.text  # a rank that passed is not in the report
    assert session.text.count("8 failed, 5 passed, 1 skipped, 1 xfailed, 1 error") == 1


@pytest.mark.parametrize(
    ("launcher", "status", "victim"), [("torchrun", 0, 1), ("mpirun", 7, 2), ("mpirun", 0, 0)]
)
def test_a_launched_rank_that_dies_ends_the_session(
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


def test_a_launched_rank_that_computes_for_ever(tmp_path: Path) -> None:
    suite = """
def test_loop(world, rank):
    while rank == 1:
        pass
"""
    session = play(tmp_path, "torchrun", suite, "--ranks-limit-s=2", "--ranks-timeout-s=4")
    assert session.returncode != 0
    assert "rank 1 is still blocked after abort (the limit of 2 s" in session.text
    assert "while rank == 1" in session.text  # where it was


# How outcomes are merged, without any process.

KINDS = {"passed", "failed", "skipped", "xfailed", "xpassed"}


def arrival(kind: str, freed_at: float | None = None, at: float = 1.0) -> Arrival:
    outcome = Outcome(kind, "headline", "text", "reason" if kind == "xfailed" else "", own=True)
    return Arrival(asdict(outcome), at, "freed" if freed_at else "", freed_at)


def report_of(kind: str) -> pytest.TestReport:
    outcome = {"xfailed": "skipped", "xpassed": "passed"}.get(kind, kind)
    extra = {"wasxfail": "reason"} if kind.startswith("x") else {}
    return pytest.TestReport("id", ("file", 1, "id"), {}, outcome, None, "call", **extra)  # type: ignore[arg-type]


@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5))
def test_merged_outcome(kinds: list[str]) -> None:
    reports = [report_of(kind) for kind in kinds]
    dirty = [merge(report, [arrival(kind) for kind in kinds]) for report in reports]
    assert len({r.outcome for r in reports}) == 1  # all ranks come to the same
    assert len(set(dirty)) == 1
    expected_failure = set(kinds) == {"xfailed", "xpassed"}
    if "failed" in kinds or (len(set(kinds)) > 1 and not expected_failure):
        assert reports[0].outcome == "failed"
        assert dirty[0]
        assert not any(hasattr(r, "wasxfail") for r in reports)
    elif expected_failure or kinds[0] == "xfailed":
        assert all((r.outcome, r.wasxfail) == ("skipped", "reason") for r in reports)
    else:
        assert reports[0].outcome == report_of(kinds[0]).outcome


def test_who_failed_by_itself() -> None:
    failed = [0, 1, 2]
    by_itself, freed = arrival("failed", at=1.0), arrival("failed", freed_at=2.0, at=2.1)
    follower = arrival("failed", at=2.2)  # not freed: a freed rank left its process group
    assert causes([by_itself, freed, follower], failed) == [0]
    assert causes([freed, by_itself, by_itself], failed) == [1, 2]
    assert causes([freed, freed, freed], failed) == []  # a limit passed everywhere
