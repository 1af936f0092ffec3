"""The control plane of a lockstep session: lines of JSON over Unix sockets, not the transport.

Rank 0 runs a ``Hub``; every rank, rank 0 too, is a ``Member`` connected to it. An open connection
is the sign of life: a rank that dies closes it, and the others know at once. The sockets are
abstract (Linux): nothing lies on disk that a killed session could leave behind.
"""

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

JOIN_TIMEOUT_S = 60.0


class Link:
    """One end of a connection that carries one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""
        self.sending = threading.Lock()

    def send(self, message: Message) -> None:
        with self.sending:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """The messages of one read, or None when the other end is gone."""
        try:
            data = self.connection.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Hub(threading.Thread):
    """Rank 0's side: gathers values, spreads failures, sees who dies and who stays away.

    Runs until all other ranks' processes have ended, or until it ended the session.
    """

    def __init__(self, address: str, world_size: int, answer_timeout_s: float) -> None:
        super().__init__(name="lockstep hub", daemon=True)
        self.world_size = world_size
        self.answer_timeout_s = answer_timeout_s
        self.links: dict[int, Link] = {}
        self.gathering: dict[int, tuple[str, Any]] = {}  # rank -> key and value it waits with
        self.gathering_since = 0.0
        self.ended = False
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(address)
        self.listener.listen(world_size)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)

    def run(self) -> None:
        start = time.monotonic()
        leaving: set[int] = set()  # said goodbye; the end of its process closes the connection
        gone: set[int] = set()
        while not self.ended and len(gone) < self.world_size - 1:
            for key, _ in self.selector.select(0.2):
                if key.fileobj is self.listener:
                    self.join_rank()
                    continue
                rank: int = key.data
                messages = self.links[rank].receive()
                if messages is None and rank in leaving:
                    gone.add(rank)
                    self.selector.unregister(self.links[rank].connection)
                elif messages is None:
                    self.end(f"rank {rank} died{self.missing_from()}")
                    break
                for message in messages or []:
                    if "bye" in message:
                        leaving.add(rank)
                    else:
                        self.handle(rank, message)
            now = time.monotonic()
            if len(self.links) < self.world_size and now - start > JOIN_TIMEOUT_S:
                absent = [r for r in range(self.world_size) if r not in self.links]
                self.end(f"rank {listed(absent)} did not start within {JOIN_TIMEOUT_S:g} s")
            if self.gathering and now - self.gathering_since > self.answer_timeout_s:
                self.end(f"no answer for {self.answer_timeout_s:g} s{self.missing_from()}")
        self.listener.close()

    def join_rank(self) -> None:
        connection, _ = self.listener.accept()
        link = Link(connection)
        hello = None
        while not hello:  # the first line is sent together with the connect
            hello = link.receive()
            if hello is None:
                return
        rank = hello[0]["hello"]
        self.links[rank] = link
        self.selector.register(connection, selectors.EVENT_READ, rank)
        for message in hello[1:]:
            self.handle(rank, message)

    def handle(self, rank: int, message: Message) -> None:
        if "gather" in message:
            if not self.gathering:
                self.gathering_since = time.monotonic()
            self.gathering[rank] = (message["gather"], message["value"])
            if len({key for key, _ in self.gathering.values()}) > 1:
                where = "; ".join(
                    f"rank {r} at {k}" for r, (k, _) in sorted(self.gathering.items())
                )
                self.end(f"the ranks are not at the same place: {where}")
            elif len(self.gathering) == self.world_size:
                values = [self.gathering[r][1] for r in range(self.world_size)]
                self.gathering = {}
                self.broadcast({"values": values})
        elif "failed" in message:
            self.broadcast(message)
        elif "dying" in message:
            self.end(f"rank {rank} {message['dying']}")

    def missing_from(self) -> str:
        if not self.gathering:
            return ""
        absent = [r for r in range(self.world_size) if r not in self.gathering]
        key = next(iter(self.gathering.values()))[0]
        return f"; not arrived at {key}: rank {listed(absent)}"

    def broadcast(self, message: Message) -> None:
        for link in self.links.values():
            try:
                link.send(message)
            except OSError:
                continue  # its own end of file tells that it is gone

    def end(self, reason: str) -> None:
        if not self.ended:
            self.ended = True
            self.broadcast({"end": reason})


class Member:
    """This rank's side; ``listen`` runs in a thread of its own and calls back."""

    def __init__(self, address: str, rank: int) -> None:
        self.link = Link(connect(address))
        self.link.send({"hello": rank})
        self.values: list[Any] | None = None
        self.arrived = threading.Condition()

    def gather(self, key: str, value: Any) -> list[Any]:
        """Every rank's value by rank; does not return when the session ends meanwhile."""
        self.link.send({"gather": key, "value": value})
        with self.arrived:
            while self.values is None:
                self.arrived.wait()
            values, self.values = self.values, None
        return values

    def listen(
        self,
        tick: Callable[[], None],
        on_failed: Callable[[int], None],
        on_end: Callable[[str], None],
        extra_fd: int,
        on_extra: Callable[[bytes], None],
    ) -> None:
        """Serves messages and ``extra_fd`` until the hub is gone; ``tick``s 5 times a second."""
        selector = selectors.DefaultSelector()
        selector.register(self.link.connection, selectors.EVENT_READ)
        selector.register(extra_fd, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(0.2):
                if key.fileobj == extra_fd:
                    on_extra(os.read(extra_fd, 64))
                    continue
                messages = self.link.receive()
                if messages is None:
                    on_end("rank 0 died")
                    return
                for message in messages:
                    if "values" in message:
                        with self.arrived:
                            self.values = message["values"]
                            self.arrived.notify()
                    elif "failed" in message:
                        on_failed(message["failed"])
                    elif "end" in message:
                        on_end(message["end"])
            tick()


def connect(address: str) -> socket.socket:
    """A connection to the hub, waiting until rank 0 has opened it."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(address)
            return connection
        except ConnectionRefusedError:
            connection.close()
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank 0 did not start within {JOIN_TIMEOUT_S:g} s") from None
            time.sleep(0.02)


def listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
