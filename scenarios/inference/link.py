"""A DEALER's end of the line to the coordinator, which notices when the coordinator has gone."""

import contextlib
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from scenarios.inference.errors import CoordinatorLost
from scenarios.inference.messages import MAX_NBYTES, decode, encode

LINGER_MS = 1000
LAST_MS = 100
"""The end of a connection is told a moment before its last messages can be read."""
_GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_MONITOR_STOPPED


class Link:
    """A connection that is made once: what breaks stays broken.

    Args:
        address: like tcp://127.0.0.1:5555.

    Raises:
        ValueError: it is no address.

    Contract: for one thread, which may change before the first call of ``poll``.
    """

    def __init__(self, address: str):
        self.address = address
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            # Not -1: then messages that came but were not read yet are dropped with the connection.
            (zmq.RECONNECT_IVL, 2**31 - 1),
            (zmq.MAXMSGSIZE, MAX_NBYTES),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
            (zmq.LINGER, LINGER_MS),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(_GONE)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self.gone = False
        """Whether the coordinator has gone, or was never there."""
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"coordinator: got address {address!r}: {error}") from None

    def wake_by(self, file_descriptor: int) -> None:
        """``poll`` returns as soon as there is something to read here, too."""
        self._poller.register(file_descriptor, zmq.POLLIN)

    def send(self, kind: str, /, **fields: Any) -> None:
        """Queues a message."""
        self._socket.send_multipart(encode(kind, **fields))

    def poll(self, timeout_s: float) -> list[tuple[str, dict[str, Any]]]:
        """Waits for messages; returns all that are there.

        Raises:
            CoordinatorLost: it has gone, and everything it had sent was returned before.
            BadMessage: something else answers there.
        """
        self._poller.poll(max(0, int(timeout_s * 1000)))
        # First the news, then what came: so nothing that was sent before the end is missed.
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self.gone = True
        messages = self._received()
        if self.gone and not messages and self._socket.poll(LAST_MS):
            messages = self._received()
        if self.gone and not messages:
            raise CoordinatorLost(f"the coordinator at {self.address} has gone or was never there")
        return messages

    def _received(self) -> list[tuple[str, dict[str, Any]]]:
        messages = []
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(decode(self._socket.recv_multipart(zmq.NOBLOCK)))
        return messages

    def close(self) -> None:
        """Sends what is queued, as far as somebody takes it, and closes."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close(0 if self.gone else LINGER_MS)
        self._context.term()
