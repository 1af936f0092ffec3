"""A sample of PyTorch's own distributed suite, and the verdict of its runner."""

import json
import subprocess
import sys
import unittest
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent / "torch_suite"
sys.path.insert(0, str(FOLDER))

from known_failures import KNOWN_FAILURES  # noqa: E402
from run import Outcome, run_one, unexpected  # noqa: E402


@pytest.mark.timeout(600)
def test_a_sample_of_each_operation_passes(tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.json"
    command = [sys.executable, str(FOLDER / "run.py"), "--sample", "--json", str(outcomes)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    by_name = json.loads(outcomes.read_text())
    failed = {name for name, outcome in by_name.items() if outcome["status"] == "fail"}
    assert failed == set(KNOWN_FAILURES)  # the sample holds what is known to fail
    words = ("all_gather", "all_reduce", "all_to_all", "broadcast", "gather", "reduce", "scatter")
    for word in (*words, "barrier", "send_recv", "isend", "irecv", "object", "sparse"):
        assert any(word in name for name in by_name), word


def a_test(body: Callable[[], None]) -> unittest.TestCase:
    return unittest.FunctionTestCase(body)


def test_outcomes_of_single_tests() -> None:
    assert run_one(a_test(lambda: None)).status == "pass"
    wrong = run_one(a_test(lambda: pytest.fail("wrong")))
    assert (wrong.status, "wrong" in wrong.reason) == ("fail", True)
    assert run_one(a_test(lambda: sys.exit(3))).status == "fail"

    def left_out() -> None:
        raise unittest.SkipTest("not here")

    skipped = run_one(a_test(left_out))
    assert (skipped.status, skipped.reason) == ("skip", "not here")


def test_what_makes_a_run_fail() -> None:
    known = {"test_known": "a reason"}
    fine = {"test_a": Outcome("pass", 1.0), "test_known": Outcome("fail", 1.0, "trace")}
    assert unexpected(fine, known) == []
    assert unexpected({"test_a": Outcome("fail", 1.0, "trace")}, known) == ["test_a failed:\ntrace"]
    (complaint,) = unexpected({"test_known": Outcome("pass", 1.0)}, known)
    assert "take it out of known_failures.py" in complaint


def test_an_empty_choice_is_not_a_pass() -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--tests", "no_such_test"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 2
    assert "no test matches" in ended.stderr
