"""Processes forked from a server are as good as new ones, and none outlives its owner."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scenarios.fork_server import ForkServer, Process

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 60.0


def say(*words: str) -> None:
    print(os.getcwd(), sorted(os.environ), *words, flush=True)
    print("to standard error", file=sys.stderr)


def fail(status: str) -> None:
    sys.exit(int(status))


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def sleep(_: str = "") -> None:
    child = os.fork()
    print(os.getpid() if child else f"child {os.getpid()}", flush=True)
    time.sleep(LIMIT_S)


def wait_for(log: Path, text: str) -> str:
    deadline = time.monotonic() + LIMIT_S
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    return log.read_text()


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server():  # type: ignore[no-untyped-def]
    with ForkServer() as server:
        yield server


def start(server: ForkServer, function: str, *args: str, log: Path) -> Process:
    environment = {"PATH": os.environ["PATH"], "ANSWER": "42"}
    target = f"tests.test_fork_server:{function}"
    return server.start(target, *args, environment=environment, log=log)


def test_a_process_has_its_own_environment_folder_and_log(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = start(server, "say", "some", "words", log=tmp_path / "log")
    assert process.wait() == 0
    first, *rest = (tmp_path / "log").read_text().splitlines()
    assert first == f"{tmp_path} ['ANSWER', 'PATH'] some words"
    assert rest == ["to standard error"]
    with pytest.raises(FileExistsError):
        start(server, "say", log=tmp_path / "log")


def test_how_a_process_ended(server: ForkServer, tmp_path: Path) -> None:
    ends = {
        "status": start(server, "fail", "7", log=tmp_path / "status"),
        "signal": start(server, "crash", log=tmp_path / "signal"),
        "error": start(server, "absent", log=tmp_path / "error"),
        "well": start(server, "say", log=tmp_path / "well"),
    }
    assert {name: process.wait() for name, process in ends.items()} == {
        "status": 7,
        "signal": -signal.SIGSEGV,
        "error": 1,
        "well": 0,
    }
    assert "has no attribute 'absent'" in (tmp_path / "error").read_text()


def test_a_signal_reaches_the_children_too(server: ForkServer, tmp_path: Path) -> None:
    process = start(server, "sleep", log=tmp_path / "log")
    child = int(wait_for(tmp_path / "log", "child ").split("child ")[1].split()[0])
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    wait_for_end(child)
    process.send_signal(signal.SIGTERM)  # of an ended process: nothing


def test_a_signal_to_all_is_for_the_owner_to_handle(server: ForkServer, tmp_path: Path) -> None:
    process = start(server, "say", log=tmp_path / "first")  # so the server is there
    assert process.wait() == 0
    for number in (signal.SIGINT, signal.SIGTERM):
        server._server.send_signal(number)
    process = start(server, "sleep", log=tmp_path / "second")
    wait_for(tmp_path / "second", str(process.pid))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


def test_what_runs_ends_with_the_server(tmp_path: Path) -> None:
    with ForkServer() as server:
        process = start(server, "sleep", log=tmp_path / "log")
        wait_for(tmp_path / "log", str(process.pid))
    wait_for_end(process.pid)


def test_a_server_that_died_is_told(tmp_path: Path) -> None:
    with ForkServer() as server:
        process = start(server, "sleep", log=tmp_path / "log")
        server._server.kill()
        with pytest.raises(RuntimeError, match="ended with status -9"):
            process.wait()
        with pytest.raises(RuntimeError, match="ended with status -9"):
            start(server, "say", log=tmp_path / "other")
    wait_for_end(process.pid)


def test_nothing_outlives_a_killed_owner(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, signal
from tests.test_fork_server import ForkServer, start, wait_for
log = pathlib.Path({str(tmp_path / "log")!r})
process = start(ForkServer(), "sleep", log=log)
wait_for(log, str(process.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -signal.SIGKILL
    pid = next(line for line in (tmp_path / "log").read_text().splitlines() if line.isdigit())
    wait_for_end(int(pid))


def test_an_import_that_fails_is_told_by_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch today')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with ForkServer() as server:
        process = server.start("torch:x", environment=dict(os.environ), log=tmp_path / "log")
        assert process.wait() == 1
    assert "no torch today" in (tmp_path / "log").read_text()
