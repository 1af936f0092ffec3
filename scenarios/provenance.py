"""Where numbers come from: commit, versions, CPU, command and time of a recording."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "collective-testbed"
PACKAGES = ("torch", "numpy", "pydantic", "safetensors")


def provenance(command: str, scale: str, layout: str, arithmetic: str) -> dict[str, object]:
    """What is written beside recorded values."""
    commit = _git("rev-parse", "HEAD")
    # A golden that is being recorded again does not make the code that records it another one.
    changes = _git("status", "--porcelain", "--", ".", ":!golden")
    return {
        "commit": commit or "unknown",
        "dirty": None if commit is None else bool(changes),
        "versions": versions(),
        "cpu": cpu_model(),
        "isa": active_isa(),
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "scale": scale,
        "layout": layout,
        "arithmetic": arithmetic,
    }


def versions() -> dict[str, str]:
    """Versions of Python, this project and the packages that touch numbers."""
    found = {"python": platform.python_version()}
    for name in (DISTRIBUTION, *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_model() -> str:
    """The CPU's name for people."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_models() -> list[str]:
    """The names of the CUDA devices; none where there is no driver or no CUDA in this build."""
    import torch  # noqa: F401  (the extension links against it)

    from primitives import _C

    try:
        return [str(device["name"]) for device in _C.cuda_devices()] if _C.cuda_built else []
    except RuntimeError:
        return []


def active_isa() -> str:
    """The instruction set that the native kernels use here.

    Raises:
        ValueError: PRIMITIVES_ISA asks for one that this CPU lacks.
    """
    import torch  # noqa: F401  (the extension links against it)

    from primitives import _C

    return str(_C.active_isa())


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
