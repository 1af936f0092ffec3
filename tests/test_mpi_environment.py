"""mpirun's settings in a virtual environment's activate."""

import subprocess
from pathlib import Path

from special_distributed import mpi_environment


def test_activate_exports_the_settings_once(tmp_path: Path) -> None:
    activate = tmp_path / "bin" / "activate"
    activate.parent.mkdir()
    activate.write_text("VIRTUAL_ENV=here")  # no newline at the end
    mpi_environment.configure(tmp_path)
    written = activate.read_text()
    mpi_environment.configure(tmp_path)
    assert activate.read_text() == written
    names = " ".join(f"${name}" for name in mpi_environment.VARIABLES)
    script = f"set -u; source {activate}; echo $VIRTUAL_ENV {names}"
    shown = subprocess.run(["bash", "-c", script], env={}, capture_output=True, text=True)
    assert shown.stdout.split() == ["here", *mpi_environment.VARIABLES.values()], shown.stderr
