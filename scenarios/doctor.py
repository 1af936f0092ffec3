"""Looks at this machine and says what the test bed can do on it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from primitives.env import SHM_DIR
from scenarios.provenance import active_isa, cpu_model, versions

SHM_NEEDED_NBYTES = 64 << 20
"""Less shared memory than this cannot hold the segments of four ranks."""


@dataclass(frozen=True)
class Finding:
    """One fact. ``ok`` is None if its absence stops nothing."""

    name: str
    value: str
    ok: bool | None


def examine() -> list[Finding]:
    """All facts about this machine, those that must be right marked so."""
    findings = [
        Finding("cpu", cpu_model(), None),
        Finding("cores", str(len(os.sched_getaffinity(0))), None),
        Finding("memory", f"{_memory_nbytes() / 2**30:.1f} GiB", None),
        _shm(),
        _required("native code", lambda: f"kernels for {active_isa()}"),
        _gpus(),
        Finding("nvcc", _program_version("nvcc", "--version"), None),
        Finding("g++", _program_version("g++", "--version"), None),
        Finding("mpirun", _program_version("mpirun", "--version"), None),
    ]
    for name, version in versions().items():
        findings.append(Finding(name, version, None))
    return findings


def conclude(findings: list[Finding]) -> str:
    """What can run here, in one line."""
    wrong = [finding for finding in findings if finding.ok is False]
    if wrong:
        return "not ready: " + "; ".join(f"{f.name}: {f.value}" for f in wrong)
    cores = int(next(f.value for f in findings if f.name == "cores"))
    return f"ready: CPU scenarios at ci scale run here ({cores} cores)"


def _required(name: str, probe: Callable[[], str]) -> Finding:
    try:
        return Finding(name, probe(), True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return Finding(name, " ".join(str(error).split()), False)


def _memory_nbytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _shm() -> Finding:
    folder = SHM_DIR.get()
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Finding(folder, str(error.strerror), False)
    text = f"{usage.free / 2**20:.0f} MiB free of {usage.total / 2**20:.0f} MiB"
    enough = usage.free >= SHM_NEEDED_NBYTES
    if not enough:
        text += f", expected at least {SHM_NEEDED_NBYTES >> 20} MiB"
    return Finding(folder, text, enough)


def _gpus() -> Finding:
    try:
        import torch  # noqa: F401  (the extension links against it)

        from primitives import _C
    except ImportError:
        return Finding("gpus", "unknown: the native code does not import", None)
    if not _C.cuda_built:
        return Finding("gpus", "none: built without nvcc", None)
    try:
        devices = _C.cuda_devices()
    except RuntimeError as error:
        return Finding("gpus", f"none: {error}", None)
    return Finding("gpus", ", ".join(describe_gpu(device) for device in devices) or "none", None)


def describe_gpu(device: Mapping[str, Any]) -> str:
    """One of ``_C.cuda_devices()``: what it is, and which ranks can meet on it or reach it."""
    linked = device["num_linked"]
    return (
        f"{device['name']} (sm_{device['capability'][0]}{device['capability'][1]}, "
        f"{device['memory_nbytes'] / 2**30:.0f} GiB; "
        f"{'several ranks' if device['shared'] else 'one rank only (its compute mode)'}; "
        f"peers: {linked} by NVLink, {device['num_peers'] - linked} by PCIe)"
    )


def _program_version(name: str, flag: str) -> str:
    beside_python = str(Path(sys.executable).parent)  # also where .venv is not activated
    path = shutil.which(name) or shutil.which(name, path=beside_python)
    if path is None:
        return "not found"
    try:
        result = subprocess.run([path, flag], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    lines = (result.stdout or result.stderr).strip().splitlines()
    told = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return f"{told} ({path})" if result.returncode == 0 else f"{path} fails: {told}"
