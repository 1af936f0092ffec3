"""S2 as a user runs it: another layout, resume layout and instruction set, the one golden."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTBED = [sys.executable, "-m", "scenarios"]
TIME_LIMIT_S = 280.0


def test_golden_holds_for_another_layout_resume_and_cpu(tmp_path: Path) -> None:
    """Recorded with tp4, pp2, ep2 and etp2; here with one rank, then resumed with experts cut."""
    choices = ["--layout", "dp1", "--resume-layout", "dp2,ep2", "--out", tmp_path / "out", "--json"]
    result = subprocess.run(
        [*TESTBED, "run", "S2", *choices],
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
