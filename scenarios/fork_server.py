"""Starts Python processes within milliseconds: forks of a server that has imported all they need.

The server (``python -m scenarios.fork_server FD PID``) imports ``PRELOADED`` once and then obeys
its owner over a socket, one JSON object a line. It has one thread and touches nothing of torch
after the import, so a fork of it is as good as a new process. It dies with its owner, and what it
started dies with it.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

PRELOADED = ("torch.distributed", "primitives.backend", "scenarios.engines.builtin")
PR_SET_PDEATHSIG = 1


class Process:
    """A process that the server started; the leader of a process group of its own."""

    def __init__(self, server: "ForkServer", pid: int) -> None:
        self._server = server
        self.pid = pid
        self.returncode: int | None = None
        """None while it runs, then its exit status, negative for a signal."""

    def poll(self) -> int | None:
        """``returncode`` as of now."""
        self._server.receive(0.0)
        return self.returncode

    def wait(self) -> int:
        """Waits for its end; ``returncode``."""
        while self.returncode is None:
            self._server.receive(None)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signals its process group, if it still runs."""
        if self.poll() is None:
            self._server.send({"signal": self.pid, "number": number})


class ForkServer:
    """The owner's side, for one thread at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._started: list[int] = []
        self._running: dict[int, Process] = {}
        self._unread = b""
        with theirs:
            command = [sys.executable, "-m", __spec__.name, str(theirs.fileno()), str(os.getpid())]
            self._server = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # read once, when torch is imported
                stdin=subprocess.DEVNULL,
            )

    def start(self, function: str, *args: str, environment: dict[str, str], log: Path) -> Process:
        """Calls a function in a new process.

        Args:
            function: ``module:function``.
            args: of the function.
            environment: of the process, all of it.
            log: new file for its standard output and error.

        Raises:
            RuntimeError: the server has died.
        """
        log.open("xb").close()
        self.send(
            {
                "start": function,
                "args": args,
                "environment": environment,
                "folder": os.getcwd(),
                "log": str(log),
            }
        )
        while not self._started:
            self.receive(None)
        process = Process(self, self._started.pop())
        self._running[process.pid] = process
        return process

    def send(self, message: dict[str, Any]) -> None:
        """Sends one command."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._died() from error

    def receive(self, timeout_s: float | None) -> None:
        """Takes in what the server says; waits for it so long, None without limit."""
        while select.select([self._socket], [], [], timeout_s)[0]:
            data = self._socket.recv(65536)
            if not data:
                raise self._died()
            *lines, self._unread = (self._unread + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "started" in message:
                    self._started.append(message["started"])
                else:
                    self._running.pop(message["ended"]).returncode = message["status"]
            timeout_s = 0.0

    def close(self) -> None:
        """Ends the server, and what it started that still runs."""
        self._socket.close()
        self._server.kill()
        self._server.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _died(self) -> RuntimeError:
        status = self._server.wait()
        return RuntimeError(f"the process that starts the ranks ended with status {status}")


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, also when that happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def serve(owner: socket.socket) -> Callable[[], None] | None:
    """The server's life: None at its end; in each process that it forks, what to do there."""
    pids: set[int] = set()
    unread = b""
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        readable, _, _ = select.select([owner, woken], [], [])
        if woken in readable:
            woken.recv(4096)
            while pids:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                pids.remove(pid)
                _say(owner, {"ended": pid, "status": os.waitstatus_to_exitcode(status)})
        if owner not in readable:
            continue
        data = owner.recv(65536)
        if not data:
            return None
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "signal" in message:
                if message["signal"] in pids:
                    os.killpg(message["signal"], message["number"])
                continue
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (owner, wake, woken):
                    end.close()
                return _become(message, server)
            os.setpgid(pid, pid)
            pids.add(pid)
            _say(owner, {"started": pid})


def _become(message: dict[str, Any], server: int) -> Callable[[], None]:
    """Turns a fork of the server into the process that was asked for."""
    os.setpgid(0, 0)
    die_with(server)
    log = os.open(message["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # The launcher stops ranks by these; Python's handlers would wait for native code to return.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(message["folder"])
    os.environ.clear()
    os.environ.update(message["environment"])

    def call() -> None:
        module, function = message["start"].split(":")
        getattr(importlib.import_module(module), function)(*message["args"])

    return call


def _say(owner: socket.socket, message: dict[str, int]) -> None:
    with contextlib.suppress(OSError):  # gone: the next read says so
        owner.sendall(json.dumps(message).encode() + b"\n")


def main() -> None:
    """Imports, serves, and in a fork calls what was asked for."""
    die_with(int(sys.argv[2]))
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, timeout: for the owner, who ends us
        signal.signal(number, signal.SIG_IGN)
    for module in PRELOADED:
        with contextlib.suppress(ImportError):  # which each process meets again, and tells
            importlib.import_module(module)
    gc.freeze()  # a fork that looks for garbage at its end would copy all these pages
    call = serve(socket.socket(fileno=int(sys.argv[1])))
    if call:
        call()


if __name__ == "__main__":
    main()
