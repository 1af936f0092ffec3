"""A sample of the native driver under AddressSanitizer (the whole: make sanitize-address)."""

import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent / "native"
DRIVER = NATIVE.parent.parent / "build" / "native" / "address" / "driver"


@pytest.fixture(scope="module")
def driver() -> Path:
    build = subprocess.run(
        ["make", "-s", "-j2", "-C", str(NATIVE), "KIND=address"], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return DRIVER


def play(driver: Path, *flags: str) -> tuple[int, str]:
    run = subprocess.run([driver, *flags], capture_output=True, text=True, timeout=240)
    return run.returncode, run.stdout + run.stderr


def test_collectives_messages_and_faults(driver: Path) -> None:
    code, output = play(driver, "--processes", "--ranks", "3", "--cases", "100")
    assert code == 0, output
    assert output.startswith("ok: 3 processes, 100 cases, 7 faults")


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_collectives_and_faults_on_an_emulated_device(driver: Path, kind: str) -> None:
    """What is around the CUDA kernels; see tests/emulator/runtime.hpp."""
    flags = ["--processes"] if kind == "processes" else []
    code, output = play(
        driver, *flags, "--device", "--ranks", "3", "--cases", "60", "--faults", "9"
    )
    assert code == 0, output
    assert output.startswith(f"ok: 3 {kind}, 60 cases, 9 faults")


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_collectives_of_a_device_by_way_of_the_host(driver: Path, kind: str) -> None:
    flags = ["--processes"] if kind == "processes" else []
    code, output = play(
        driver, *flags, "--by-host", "--ranks", "3", "--cases", "60", "--faults", "0"
    )
    assert code == 0, output
    assert output.startswith(f"ok: 3 {kind}, 60 cases, 0 faults")


@pytest.mark.parametrize(
    ("mistake", "report"),
    [("overflow", "heap-buffer-overflow"), ("bits", "a flipped bit"), ("none", "unknown mistake")],
)
def test_a_mistake_is_found(driver: Path, mistake: str, report: str) -> None:
    code, output = play(driver, "--break", mistake, "--cases", "1", "--faults", "0")
    assert code != 0, output
    assert report in output
