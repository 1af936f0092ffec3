"""The control plane of lockstep: lines of JSON over Unix sockets, never the collectives under test.

A star: one ``Hub``, and on every rank a ``Member`` connected to it. An open connection is the sign
of life: a rank that dies closes it, and the hub knows at once. The sockets are abstract (Linux):
nothing lies on disk that a killed session could leave behind.
"""

import functools
import json
import os
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

Message = dict[str, Any]

JOIN_TIMEOUT_S = 60.0
POLL_S = 0.2


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


class Hub:
    """The centre: gathers values, spreads failures, sees who dies and who stays away.

    What it cannot settle itself waits in ``inbox`` as (rank, message). Once ``lost`` says why these
    ranks cannot go on, nothing more is served.

    Args:
        address: an abstract Unix socket address, known to all ranks.
        world_size: how many ranks will join.
        answer_timeout_s: how long ranks wait in a gather for the last one.
    """

    def __init__(self, address: str, world_size: int, answer_timeout_s: float) -> None:
        self.world_size = world_size
        self.answer_timeout_s = answer_timeout_s
        self.links: dict[int, Link] = {}
        self.gathering: dict[int, tuple[str, Any]] = {}  # rank -> key and value it waits with
        self.gathering_since = 0.0
        self.started = time.monotonic()
        self.heard = self.started  # when the last message came
        self.leaving: set[int] = set()  # said goodbye; the end of its process closes the connection
        self.gone: set[int] = set()
        self.inbox: deque[tuple[int, Message]] = deque()
        self.lost = ""
        self.culprits: list[int] = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(address)
        self.listener.listen(world_size)
        self.selector = selectors.DefaultSelector()
        self.watch(self.listener, self.join_rank)

    def watch(self, source: Any, on_readable: Callable[[], None]) -> None:
        self.selector.register(source, selectors.EVENT_READ, on_readable)

    def serve(self) -> None:
        """Until all other ranks' processes have ended, or until nothing can go on."""
        while not self.lost and len(self.gone) < self.world_size - 1:
            self.poll()
        if self.lost:
            self.broadcast({"end": self.lost})
        self.listener.close()

    def close(self) -> None:
        self.selector.close()
        self.listener.close()
        for link in self.links.values():
            link.connection.close()

    def poll(self) -> None:
        """Handles what has come, or waits a moment for it; judges who should have come by now."""
        for key, _ in self.selector.select(POLL_S):
            if not self.lost:
                key.data()
        now = time.monotonic()
        if len(self.links) < self.world_size and now - self.started > JOIN_TIMEOUT_S:
            absent = [r for r in range(self.world_size) if r not in self.links]
            self.lose(f"rank {listed(absent)} did not start within {JOIN_TIMEOUT_S:g} s", absent)
        if self.gathering and now - self.gathering_since > self.answer_timeout_s:
            absent = [r for r in range(self.world_size) if r not in self.gathering]
            self.lose(f"no answer for {self.answer_timeout_s:g} s{self.missing_from()}", absent)

    def join_rank(self) -> None:
        connection, _ = self.listener.accept()
        link = Link(connection)
        hello = None
        while not hello:  # the first line is sent together with the connect
            hello = link.receive()
            if hello is None:
                return
        rank: int = hello[0]["hello"]
        self.links[rank] = link
        self.watch(connection, functools.partial(self.hear, rank))
        for message in hello[1:]:
            self.handle(rank, message)

    def hear(self, rank: int) -> None:
        messages = self.links[rank].receive()
        self.heard = time.monotonic()
        if messages is None:
            self.selector.unregister(self.links[rank].connection)
            self.gone.add(rank)
            if rank not in self.leaving:
                self.lose(f"rank {rank} died{self.missing_from()}", [rank])
        for message in messages or []:
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
                self.lose(f"the ranks are not at the same place: {where}", [])
            elif len(self.gathering) == self.world_size:
                values = [self.gathering[r][1] for r in range(self.world_size)]
                self.gathering = {}
                self.broadcast({"values": values})
        elif "failed" in message:
            self.broadcast(message)
        elif "dying" in message:
            self.lose(f"rank {rank} {message['dying']}", [rank])
        elif "bye" in message:
            self.leaving.add(rank)
        else:
            self.inbox.append((rank, message))

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

    def lose(self, reason: str, culprits: list[int]) -> None:
        if not self.lost:
            self.lost, self.culprits = reason, culprits


class Listener(Protocol):
    """What a member's thread calls."""

    def tick(self) -> float:
        """After each message, and when the seconds that it returned last have passed."""

    def on_values(self) -> None:
        """A gather is complete."""

    def on_failed(self, step: int) -> None:
        """Some rank failed in this step."""

    def on_end(self, reason: str) -> NoReturn:
        """The hub gave up or is gone."""

    def on_signals(self, numbers: bytes) -> None:
        """Signals arrived at the descriptor that was given."""


class Member:
    """This rank's side."""

    def __init__(self, address: str, rank: int) -> None:
        self.link = Link(connect(address))
        self.link.send({"hello": rank})
        self.values: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self.commands: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def gather(self, key: str, value: Any) -> list[Any]:
        """Every rank's value by rank; does not return when the session ends meanwhile."""
        self.link.send({"gather": key, "value": value})
        return self.values.get()

    def listen(self, listener: Listener, signals: int | None) -> None:
        """Serves messages, and the descriptor ``signals``, in a thread, until the hub is gone."""
        selector = selectors.DefaultSelector()
        selector.register(self.link.connection, selectors.EVENT_READ)
        if signals is not None:
            selector.register(signals, selectors.EVENT_READ)
        wait_s = POLL_S
        while True:
            for key, _ in selector.select(wait_s):
                if key.fileobj == signals:
                    listener.on_signals(os.read(key.fd, 64))
                    continue
                messages = self.link.receive()
                if messages is None:
                    listener.on_end("the one who leads the session died")
                for message in messages:
                    if "values" in message:
                        listener.on_values()
                        self.values.put(message["values"])
                    elif "failed" in message:
                        listener.on_failed(message["failed"])
                    elif "end" in message:
                        listener.on_end(message["end"])
                    else:
                        self.commands.put(message)
            wait_s = listener.tick()


def connect(address: str) -> socket.socket:
    """A connection to the hub, waiting until it is open."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(address)
            return connection
        except ConnectionRefusedError:
            connection.close()
            if time.monotonic() > deadline:
                raise RuntimeError(f"no session opened within {JOIN_TIMEOUT_S:g} s") from None
            time.sleep(0.02)


def listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
