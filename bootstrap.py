"""Sets up what is missing: ``.venv``, the pinned packages, the native build.

    python3 bootstrap.py            set up; prints nothing when all is in place
    python3 bootstrap.py --clean    start the environment anew

Needs the standard library only. A second run compares two digests and returns at once. If torch is
already importable, it is used as it is: its site-packages become visible inside ``.venv`` and no
other torch is installed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from special_distributed.mpi_environment import configure as configure_mpi

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "bootstrap.json"
SUPPORTED_PYTHON = ((3, 11), (3, 12))
SUPPORTED_TORCH = ((2, 11), (2, 14))  # from, below
PROBE_TORCH = """
import importlib.metadata, importlib.util, pathlib
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    print(importlib.metadata.version("torch"), pathlib.Path(spec.origin).parent.parent)
"""


def fail(message: str) -> None:
    sys.exit(f"bootstrap: error: {message}")


def say(message: str) -> None:
    print(f"bootstrap: {message}", file=sys.stderr, flush=True)


def step(title: str, action: Callable[[], None]) -> None:
    say(f"{title} ...")
    start = time.monotonic()
    action()
    say(f"{title}: done in {time.monotonic() - start:.0f} s")


def run(*command: str | Path, hint: str = "") -> None:
    """Runs a command; on failure shows its output and ends with one clear line."""
    quiet = not sys.stderr.isatty()
    result = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        stdout=subprocess.PIPE if quiet else sys.stderr,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
    )
    if result.returncode != 0:
        if result.stdout:
            print(result.stdout[-8000:], file=sys.stderr)
        fail(f"`{' '.join(map(str, command))}` failed with exit code {result.returncode}. {hint}")


def digest(paths: Iterable[Path], *extra: str) -> str:
    sha = hashlib.sha256("\n".join(extra).encode())
    for path in sorted(paths):
        sha.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def base_python(recorded: str) -> str:
    """An interpreter of a supported version: the caller's own, else one on PATH."""
    if Path(sys.prefix).resolve() == VENV:  # called from inside: stay with what .venv was made from
        return recorded
    if sys.version_info[:2] in SUPPORTED_PYTHON:
        return sys.executable
    for minor in (12, 11):
        if found := shutil.which(f"python3.{minor}"):
            return found
    raise SystemExit(
        f"bootstrap: error: Python 3.11 or 3.12 is needed, got {sys.version.split()[0]} "
        f"({sys.executable}), and neither python3.11 nor python3.12 is on PATH"
    )


def existing_torch(python: str) -> tuple[str, str] | None:
    """(version, site-packages) of the torch that ``python`` imports, if it is one we support."""
    found = subprocess.run([python, "-c", PROBE_TORCH], capture_output=True, text=True).stdout
    if not found.strip():
        return None
    version, site_packages = found.strip().split(" ", 1)
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if SUPPORTED_TORCH[0] <= release < SUPPORTED_TORCH[1]:
        return version, site_packages
    say(f"torch {version} is not supported (need >= 2.11, < 2.14); installing the pinned one")
    return None


def make_venv(python: str) -> None:
    shutil.rmtree(VENV, ignore_errors=True)
    if subprocess.run([python, "-m", "venv", VENV], capture_output=True).returncode == 0:
        return
    # Debian splits ensurepip off: let the system's pip install pip into a bare environment.
    shutil.rmtree(VENV, ignore_errors=True)
    run(python, "-m", "venv", "--without-pip", VENV)
    hint = "This Python has no ensurepip and no pip: install python3-venv or python3-pip."
    run(python, "-m", "pip", "--python", PYTHON, "install", "pip", hint=hint)


def install_packages(torch: tuple[str, str] | None) -> None:
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    options = ["--disable-pip-version-check"]
    if torch:
        version, site_packages = torch
        say(f"using the torch {version} in {site_packages}")
        purelib = sysconfig.get_path("purelib", vars={"base": str(VENV)})
        Path(purelib, "outer_torch.pth").write_text(site_packages + "\n")
        requirements = [line for line in requirements if not line.startswith("torch==")]
        # Everything but torch goes into .venv, with its commands, whatever the outer place holds.
        options += ["--no-deps", "--ignore-installed"]
    chosen = VENV / "requirements.txt"
    chosen.write_text("\n".join(requirements) + "\n")
    run(PYTHON, "-m", "pip", "install", *options, "-r", chosen)
    configure_mpi(VENV)


def build() -> None:
    if not shutil.which(os.environ.get("CXX", "g++")):
        fail("no C++ compiler: install g++ 11 or newer (or set CXX)")
    hint = "The native build needs g++ 11 or newer and the Python headers (python3-dev)."
    pip = (PYTHON, "-m", "pip", "install", "--disable-pip-version-check")
    run(*pip, "--no-build-isolation", "--no-deps", "--editable", ".", hint=hint)
    say((ROOT / "build" / "summary.txt").read_text().rstrip())


def main() -> None:
    if "--clean" in sys.argv[1:]:
        shutil.rmtree(VENV, ignore_errors=True)
    with open(ROOT / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        bring_up_to_date()


def bring_up_to_date() -> None:
    done = json.loads(STAMP.read_text()) if STAMP.exists() and PYTHON.exists() else {}
    python = base_python(done.get("python", ""))
    torch = existing_torch(python)
    build_settings = [
        f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("PRIMITIVES_")
    ]
    sources = [p for p in ROOT.glob("csrc/**/*") if p.is_file()]
    wanted = {
        "python": python,
        "packages": digest([ROOT / "requirements.txt"], python, str(torch)),
        "build": digest([*sources, ROOT / "setup.py", ROOT / "pyproject.toml"], *build_settings),
    }
    if done.get("packages") != wanted["packages"]:
        step("python environment in .venv", lambda: make_venv(python))
        step("pinned packages", lambda: install_packages(torch))
        STAMP.write_text(json.dumps(wanted | {"build": ""}))
        done = {}
    if done.get("build") != wanted["build"] or not any(ROOT.glob("primitives/_C*.so")):
        step("native build", build)
        STAMP.write_text(json.dumps(wanted))


if __name__ == "__main__":
    main()
