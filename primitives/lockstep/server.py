"""A process that knows all tests and has run none: it forks ranks within milliseconds.

It is itself a fork of the pytest process, made when the tests are collected and nothing has run.
So everything is imported, and whatever the tests start later in pytest or in a rank (threads,
process groups, signal handlers) is not in the ranks that are forked next.
"""

import contextlib
import ctypes
import functools
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from primitives.lockstep.control import Link

PR_SET_PDEATHSIG = 1
EXIT_INTERNAL = 70


class ForkServer:
    """The parent's handle of the server.

    Args:
        be_rank: the life of a rank, called in a new process with rank and hub address.

    Raises:
        RuntimeError: this process has threads; a fork of it could block on what they hold.
    """

    def __init__(self, be_rank: Callable[[int, str], None]) -> None:
        others = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
        if others:
            raise RuntimeError(
                f"lockstep: ranks cannot be forked: importing the tests started threads ({others});"
                " run them under mpirun or torchrun instead of --ranks"
            )
        ours, theirs = socket.socketpair()
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            live(parent, lambda: serve(Link(theirs), be_rank))
        theirs.close()
        self.link = Link(ours)
        self.pids: dict[int, int] = {}  # pid, also of the process group -> rank
        self.groups: list[int] = []
        self.endings: dict[int, str] = {}  # rank -> how its process ended

    def fork(self, num_ranks: int, address: str) -> None:
        """Starts new ranks, which connect to ``address``; the last ones must have ended."""
        self.pids, self.endings = {}, {}
        self.link.send({"fork": num_ranks, "address": address})
        while not self.pids:
            self.receive()

    def receive(self) -> None:
        """Waits for news of the ranks."""
        messages = self.link.receive()
        if messages is None:
            raise RuntimeError("lockstep: the process that forks the ranks died")
        for message in messages:
            if "pids" in message:
                self.groups = message["pids"]
                self.pids = {pid: rank for rank, pid in enumerate(self.groups)}
            elif message["ended"] in self.pids:  # and not one of earlier ranks
                self.endings[self.pids.pop(message["ended"])] = described(message["status"])

    def abort(self, ranks: list[int]) -> None:
        """Has those of ``ranks`` that still live say where they are, by faulthandler's SIGABRT."""
        for pid, rank in self.pids.items():
            if rank in ranks:
                os.kill(pid, signal.SIGABRT)

    def kill(self) -> None:
        """Kills the ranks, and what they have started and not ended."""
        for pid in self.groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for pid in self.pids:  # has not made its group yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the server; its ranks must have ended."""
        self.link.connection.close()
        os.waitpid(self.pid, 0)


def live(parent: int, life: Callable[[], None]) -> NoReturn:
    """The rest of a forked process: no terminal, no longer than its parent, no way back."""
    status = EXIT_INTERNAL
    try:
        os.setsid()  # an interrupt from the keyboard is for the parent to handle
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            life()
            status = 0
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def serve(link: Link, be_rank: Callable[[int, str], None]) -> None:
    """Forks ranks on request and tells how they end, until the parent is gone."""
    server = os.getpid()
    selector = selectors.DefaultSelector()
    selector.register(link.connection, selectors.EVENT_READ, 0)
    while True:
        for key, _ in selector.select():
            if pid := key.data:  # its process has ended
                selector.unregister(key.fileobj)
                os.close(key.fd)
                link.send({"ended": pid, "status": os.waitpid(pid, 0)[1]})
                continue
            messages = link.receive()
            if messages is None:
                return
            for message in messages:
                pids = []
                for rank in range(message["fork"]):
                    pid = os.fork()
                    if pid == 0:
                        selector.close()
                        link.connection.close()
                        address: str = message["address"]
                        live(server, functools.partial(be_rank, rank, address))
                    pids.append(pid)
                link.send({"pids": pids})
                for pid in pids:
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)


def described(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
