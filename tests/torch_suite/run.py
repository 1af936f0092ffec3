"""Runs torch's own distributed test suite, from the installed wheel, on the backend.

    python tests/torch_suite/run.py                 all of it
    python tests/torch_suite/run.py --sample        one or two tests of each operation (CI)
    python tests/torch_suite/run.py --tests REGEX   those whose name matches

Exit code 1 when a test fails that known_failures.py does not explain, or one passes that it does.
"""

import argparse
import collections
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import unittest
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TEST_LIMIT_S = 100
WORLD_SIZE = 8  # the least that every test accepts
SAMPLE = (
    r"DistributedDataParallelCPU$|barrier_timeout_full|monitored_barrier_gloo$|all_gather$|"
    r"all_gather_coalesced_with_empty|all_gather_object_subgroup|"
    r"all_reduce_(sum|product|group_min|sum_async|coalesced_sum|complex_unsupported_ops)$|"
    r"sparse_all_reduce|all_to_all$|all_to_all_single_unequal_split_complex|"
    r"batch_isend_irecv_gloo$|broadcast_group|ddp_logging_data_cpu|gather_group|"
    r"reduce_group_sum|scatter_object|isend$|irecv$|send_recv_any_source$|"
    r"send_recv_with_tag$|bucket_cap"
)


@dataclass
class Outcome:
    """How one test ended."""

    status: str  # pass, fail or skip
    seconds: float
    reason: str = ""


class Outcomes(unittest.TestResult):
    """Collects the outcome of the one test that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.monotonic()
        self.outcome: Outcome | None = None

    def _end(self, status: str, reason: str = "") -> None:
        # A failure stays: tearDown may add another outcome.
        if self.outcome is None or self.outcome.status != "fail":
            self.outcome = Outcome(status, round(time.monotonic() - self.start, 2), reason)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._end("pass")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._end("skip", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        self._end("pass", "as expected, it fails")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self._end("fail", "it was expected to fail")

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self._end("fail", "".join(traceback.format_exception(*err)))

    addError = addFailure


def run_one(test: unittest.TestCase) -> Outcome:
    """Runs a test and ends the ranks that it may have left."""
    result = Outcomes()
    try:
        test.run(result)
    except BaseException as error:  # torch's harness ends a test by SystemExit in places
        if isinstance(error, KeyboardInterrupt):
            raise
        result.addError(test, sys.exc_info())
    for process in getattr(test, "processes", []):
        process.kill()
    return result.outcome or Outcome("fail", 0.0, "the test ended without an outcome")


def prepare_environment(folder: str) -> None:
    """What torch's suite reads from the environment, in this process and in the ranks'."""
    os.environ.update(
        WORLD_SIZE=str(WORLD_SIZE),
        TEMP_DIR=folder,
        DISTRIBUTED_TESTS_DEFAULT_TIMEOUT=str(TEST_LIMIT_S),
        OMP_NUM_THREADS="1",
        PYTHONWARNINGS="ignore",
        PYTORCH_PRINT_REPRO_ON_FAILURE="0",
        PYTHONPATH=os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    )
    for name in ("barrier", "test_dir", "init_dir"):
        os.makedirs(os.path.join(folder, name))


def unexpected(outcomes: dict[str, Outcome], known: dict[str, str]) -> list[str]:
    """What makes the run fail: unexplained failures, and explanations of what does not fail."""
    complaints = []
    for name, outcome in outcomes.items():
        if outcome.status == "fail" and name not in known:
            complaints.append(f"{name} failed:\n{outcome.reason.rstrip()[-3000:]}")
        if outcome.status == "pass" and name in known:
            complaints.append(f"{name} passes: take it out of known_failures.py")
    return complaints


def table(outcomes: dict[str, Outcome], num_all: int, seconds: float) -> str:
    """Counts by outcome, and why what did not pass did not."""
    from known_failures import KNOWN_FAILURES

    counts = collections.Counter(outcome.status for outcome in outcomes.values())
    lines = [
        "",
        f"{'run':>6}{'pass':>6}{'fail':>6}{'skip':>6}   of {num_all} meaningful tests",
        f"{len(outcomes):>6}{counts['pass']:>6}{counts['fail']:>6}{counts['skip']:>6}"
        f"   in {seconds:.0f} s",
    ]
    for name, outcome in outcomes.items():
        if outcome.status == "fail" and name in KNOWN_FAILURES:
            lines.append(f"known failure: {name}: {KNOWN_FAILURES[name]}")
        if outcome.status == "skip":
            lines.append(f"skipped: {name}: {outcome.reason}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--sample", action="store_true", help="a few tests of each operation")
    parser.add_argument("--tests", default="", metavar="REGEX", help="only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every outcome, for programs")
    parser.add_argument("--log", default=os.devnull, metavar="FILE", help="what the ranks print")
    arguments = parser.parse_args()

    sys.path[:0] = [str(HERE), str(ROOT)]
    with tempfile.TemporaryDirectory(prefix="torch_suite") as folder:
        from known_failures import KNOWN_FAILURES

        prepare_environment(folder)
        multiprocessing.set_forkserver_preload(["suite_cases"])
        try:
            import suite_cases
        except ModuleNotFoundError as error:
            print(f"torch's test suite needs a package that is missing: {error}", file=sys.stderr)
            return 2
        cases = suite_cases.all_cases()
        pattern = SAMPLE if arguments.sample else arguments.tests
        chosen = {name: test for name, test in cases.items() if re.search(pattern, name)}
        if not chosen:
            print(f"no test matches {pattern!r}", file=sys.stderr)
            return 2

        terminal = os.fdopen(os.dup(1), "w", buffering=1)
        log = os.open(arguments.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        start = time.monotonic()
        outcomes = {}
        for name, test in chosen.items():
            outcome = outcomes[name] = run_one(test)
            print(f"{outcome.status:<5}{outcome.seconds:7.1f} s  {name}", file=terminal)
        seconds = time.monotonic() - start
        print(table(outcomes, len(cases), seconds), file=terminal)
        complaints = unexpected(outcomes, KNOWN_FAILURES)
        for complaint in complaints:
            print(complaint, file=terminal)
        if arguments.json:
            by_name = {name: asdict(outcome) for name, outcome in outcomes.items()}
            arguments.json.write_text(json.dumps(by_name, indent=1))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
