"""S2 and S4 as a user runs them: another layout, resume layout and CPU, the one golden."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTBED = [sys.executable, "-m", "scenarios"]
TIME_LIMIT_S = 280.0


@pytest.mark.parametrize(
    ("case", "resume_layout"),
    [
        ("S2", "dp2,ep2"),  # recorded with tp4, pp2, ep2, etp2 and sp
        ("S4", "tp2,sp"),  # recorded with tp2 and pp2
    ],
)
def test_golden_holds_for_another_layout_resume_and_cpu(
    tmp_path: Path, case: str, resume_layout: str
) -> None:
    """Here with one rank, then resumed with experts or tokens cut."""
    layouts = ["--layout", "dp1", "--resume-layout", resume_layout]
    result = subprocess.run(
        [*TESTBED, "run", case, *layouts, "--out", tmp_path / "out", "--json"],
        cwd=ROOT,
        env={**os.environ, "PRIMITIVES_ISA": "avx2"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    checks = json.loads(result.stdout)["checks"]
    assert {check["name"] for check in checks} == {"complete and finite", "resume", "golden"}
    assert all(check["passed"] for check in checks)
