"""A sample of ``make checkpoint-kills``."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_kills_at_some_points_of_a_save() -> None:
    command = [sys.executable, str(ROOT / "tests" / "checkpoint_kills.py"), "--points", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:  # the last kill comes after the commit
        assert "3 kills" in line
        assert "'before': 0" not in line
        assert "'after': 0" not in line
