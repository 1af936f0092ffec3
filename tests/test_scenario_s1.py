"""S1 as a user runs it: other layouts and instruction sets against the one golden; a lost rank."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import rank_processes

from scenarios.golden import metrics_from_steps, read_golden
from scenarios.launch import launch
from scenarios.metrics_file import read_steps
from scenarios.schema import load_scenario
from scenarios.worker import Job

ROOT = Path(__file__).resolve().parent.parent
TESTBED = [sys.executable, "-m", "scenarios"]
TIME_LIMIT_S = 240.0


@pytest.mark.parametrize(
    ("layout", "resumed", "isa"),
    [("dp1", "dp1", "avx2"), ("dp2", "tp2,sp", ""), ("tp2,pp2,sp", "dp4,zero0", "")],
)
def test_golden_holds_for_other_layouts_and_cpus(
    layout: str, resumed: str, isa: str, tmp_path: Path
) -> None:
    """Recorded with dp4, the golden also holds in other layouts and for another instruction set."""
    choices = ["--layout", layout, "--resume-layout", resumed, "--out", tmp_path / "out", "--json"]
    result = subprocess.run(
        [*TESTBED, "run", "S1", *choices],
        cwd=ROOT,
        env={**os.environ, "PRIMITIVES_ISA": isa},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    verdict = json.loads(result.stdout)
    assert {check["name"] for check in verdict["checks"]} == {
        "complete and finite",
        "resume",
        "golden",
    }
    assert all(check["passed"] for check in verdict["checks"])


def test_sigkill_of_a_rank_in_mid_step(tmp_path: Path) -> None:
    """The others stop within 10 s, the lost rank is named, the last checkpoint loads."""
    out, shm = tmp_path / "out", tmp_path / "shm"
    shm.mkdir()
    run = subprocess.Popen(
        [*TESTBED, "run", "S1", "--out", out],
        cwd=ROOT,
        env={**os.environ, "PRIMITIVES_SHM_DIR": str(shm)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + TIME_LIMIT_S
        metrics = out / "run1" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 24):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = rank_processes(out / "run1")
        assert sorted(pids) == [0, 1, 2, 3]
        os.kill(pids[2], signal.SIGKILL)
        start = time.monotonic()
        _, message = run.communicate(timeout=TIME_LIMIT_S)
        stopped_after_s = time.monotonic() - start
    finally:
        run.kill()
    assert run.returncode == 3
    assert stopped_after_s < 10
    assert rank_processes(out / "run1") == {}
    assert list(shm.iterdir()) == []
    last_line = message.strip().splitlines()[-1]
    assert re.search(r"rank 2 .*SIGKILL", last_line), message
    assert "PeerLost" in last_line
    assert re.search(r"(reduce_scatter|all_gather|all_reduce|broadcast|gather).*\d+", last_line)
    assert "Traceback" not in message

    (out / "again").mkdir()
    job = json.loads((out / "run1" / "job.json").read_text())
    again = job | {"run_dir": str(out / "again"), "resume": True}
    launch(Job(**again), world_size=4)
    resumed = metrics_from_steps(read_steps(out / "again" / "metrics.jsonl"))
    golden = read_golden(load_scenario("S1", scale="ci").golden_path, "ci").metrics
    assert resumed.keys() == golden.keys()
    for name, metric in resumed.items():
        assert metric.values == {s: v for s, v in golden[name].values.items() if s > 20}, name
