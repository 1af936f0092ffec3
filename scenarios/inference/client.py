"""The client: futures, deadlines, cancelling and streaming.

A thread of its own owns the socket. A request is a future; cancelling it, or its deadline, tells
the service to forget the request. When the coordinator goes, every future ends with
``CoordinatorLost``.
"""

import contextlib
import heapq
import itertools
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

from scenarios.inference.errors import (
    BY_KIND,
    CoordinatorLost,
    InferenceError,
    Refused,
    RequestTimeout,
)
from scenarios.inference.link import Link
from scenarios.inference.messages import BadMessage
from scenarios.inference.request import Request

OnTokens = Callable[[list[int]], None]


@dataclass(frozen=True)
class Completion:
    """A finished request."""

    id: str
    tokens: list[int]
    log_probs: list[float]
    prompt_log_probs: list[float]
    """From the second token of the prompt on; empty unless asked for."""
    digests: list[str]
    """Of the logits that each token was chosen by."""
    reason: str
    replica: int
    retried: bool
    """Whether another replica was lost while it worked on it."""
    latency_s: float
    token_times_s: list[float]
    """When each token came, since the request was sent; only of a streamed request."""


@dataclass(eq=False)
class _Waiting:
    request: Request
    future: "Future[Completion]"
    timeout_s: float
    on_tokens: OnTokens | None
    sent_s: float = 0.0
    times_s: list[float] = field(default_factory=list)


class Client:
    """A connection to a service.

    Args:
        address: of the coordinator.
        timeout_s: for the connection.

    Raises:
        CoordinatorLost: nobody answers there.
        ValueError: no address.
    """

    def __init__(self, address: str, timeout_s: float = 30.0):
        self._link = Link(address)
        self._calls: deque[Callable[[], None]] = deque()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._link.wake_by(self._woken)
        self._waiting: dict[str, _Waiting] = {}
        self._deadlines: list[tuple[float, int, _Waiting]] = []
        self._numbers, self._asks = itertools.count(), itertools.count(1)
        self._answers: dict[int, Future[dict[str, Any]]] = {}
        self._lost: CoordinatorLost | None = None
        self._closed = self._ended = False
        self._lock = threading.Lock()
        """Guards the wake pipe against a close at the same time."""
        self._thread = threading.Thread(target=self._run, name="inference-client", daemon=True)
        self._thread.start()
        try:
            self.model: dict[str, Any] = self._ask("CONNECT", timeout_s)["model"]
            """The model's sizes."""
        except BaseException:
            self.close()
            raise

    # -- from any thread -------------------------------------------------------------------------

    def submit(
        self, request: Request, *, timeout_s: float = 600.0, on_tokens: OnTokens | None = None
    ) -> "Future[Completion]":
        """Sends a request.

        Args:
            request: its id is in use by no other one of this client.
            timeout_s: after which the future fails with RequestTimeout.
            on_tokens: called with new tokens as they come, on the client's thread; what it raises
                ends the request.

        Returns:
            A future of its completion; it fails with an InferenceError, and can be cancelled.
        """
        future: Future[Completion] = Future()
        waiting = _Waiting(request, future, timeout_s, on_tokens)
        self._call(lambda: self._send_request(waiting))
        future.add_done_callback(
            lambda f: self._call(lambda: self._forget_cancelled(waiting)) if f.cancelled() else None
        )
        return future

    def generate(self, request: Request, *, timeout_s: float = 600.0) -> Completion:
        """Sends a request and waits for its completion; errors as of ``submit``."""
        return self.submit(request, timeout_s=timeout_s).result()

    def stream(self, request: Request, *, timeout_s: float = 600.0) -> Iterator[int]:
        """Sends a request and yields its tokens as they come; leaving the loop cancels it."""
        tokens: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        future = self.submit(request, timeout_s=timeout_s, on_tokens=tokens.put)
        future.add_done_callback(lambda _: tokens.put(None))
        try:
            while (new := tokens.get()) is not None:
                yield from new
            future.result()
        finally:
            future.cancel()

    def command(self, name: str, timeout_s: float = 600.0) -> dict[str, Any]:
        """PAUSE, UNPAUSE, SUSPEND, RESUME, STOP or STATUS; waits until all replicas are there.

        Returns:
            ``state``, ``queued`` and ``replicas``.

        Raises:
            Refused: the state does not allow it.
        """
        return self._ask(name, timeout_s)

    def close(self) -> None:
        """Says goodbye; futures that still wait are cancelled."""
        if not self._closed:
            self._call(self._end)
            self._thread.join()
            with self._lock:
                self._closed = True
                os.close(self._wake)
                os.close(self._woken)
            while self._calls:  # that came while the thread ended
                self._calls.popleft()()
            self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, kind: str, timeout_s: float) -> dict[str, Any]:
        answer: Future[dict[str, Any]] = Future()

        def send() -> None:
            if self._lost is not None:
                answer.set_exception(self._lost)
                return
            number = next(self._asks)
            self._answers[number] = answer
            self._link.send(kind, ask=number)

        self._call(send)
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            raise CoordinatorLost(
                f"{kind}: no answer from {self._link.address} within {timeout_s:g} s"
            ) from None

    def _call(self, function: Callable[[], None]) -> None:
        """Has the client's thread call it; after the end it is called here, and finds it so."""
        with self._lock:
            if not self._closed:
                self._calls.append(function)
                with contextlib.suppress(BlockingIOError):  # full: it is awake
                    os.write(self._wake, b"x")
                return
        function()

    # -- on the client's thread ------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended:
            next_s = self._deadlines[0][0] if self._deadlines else time.monotonic() + 3600.0
            timeout_s = max(0.0, next_s - time.monotonic())
            if self._lost is not None:
                select.select([self._woken], [], [], timeout_s)
            else:
                try:
                    for kind, fields in self._link.poll(timeout_s):
                        self._receive(kind, fields)
                except CoordinatorLost as error:
                    self._lose(error)
                except BadMessage as error:
                    where = self._link.address
                    self._lose(CoordinatorLost(f"{where} is no coordinator of ours: {error}"))
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 65536)
            while self._calls:
                self._calls.popleft()()
            while self._deadlines and self._deadlines[0][0] <= time.monotonic():
                self._time_out(heapq.heappop(self._deadlines)[2])

    def _send_request(self, waiting: _Waiting) -> None:
        name = waiting.request.id
        if self._lost is not None:
            _fail(waiting.future, self._lost)
        elif name in self._waiting:
            _fail(waiting.future, Refused(f"request {name!r}: this id is in use by this client"))
        elif not waiting.future.cancelled():
            self._waiting[name] = waiting
            waiting.sent_s = time.monotonic()
            deadline_s = waiting.sent_s + waiting.timeout_s
            heapq.heappush(self._deadlines, (deadline_s, next(self._numbers), waiting))
            request = waiting.request.model_dump(mode="json")
            self._link.send("SUBMIT", request=request, stream=waiting.on_tokens is not None)

    def _receive(self, kind: str, fields: dict[str, Any]) -> None:
        if fields.get("ask"):
            answer = self._answers.pop(fields["ask"], None)
            if answer is not None and kind == "ERROR":
                _fail(answer, _error(fields))
            elif answer is not None:
                _finish(answer, fields)
        elif kind in ("PARTIAL", "REPLY", "ERROR"):
            waiting = self._waiting.get(fields["id"])
            if waiting is None:
                return  # cancelled, or told twice
            if kind == "PARTIAL":
                self._partial(waiting, fields)
                return
            del self._waiting[fields["id"]]
            if kind == "ERROR":
                _fail(waiting.future, _error(fields))
            else:
                latency_s = time.monotonic() - waiting.sent_s
                _finish(waiting.future, Completion(**fields, latency_s=latency_s,
                                                   token_times_s=waiting.times_s))  # fmt: skip

    def _partial(self, waiting: _Waiting, fields: dict[str, Any]) -> None:
        if fields["first"] != len(waiting.times_s):
            return  # told twice
        elapsed_s = time.monotonic() - waiting.sent_s
        waiting.times_s += [elapsed_s] * len(fields["tokens"])
        try:
            if waiting.on_tokens is not None:
                waiting.on_tokens(fields["tokens"])
        except Exception as error:  # the caller's: it ends this request and no other
            self._forget(waiting)
            _fail(waiting.future, error)

    def _forget(self, waiting: _Waiting) -> bool:
        """Tells the service to forget a request, if it is on its way."""
        name = waiting.request.id
        if self._waiting.get(name) is not waiting:
            return False
        del self._waiting[name]
        self._link.send("ABORT", id=name)
        return True

    def _forget_cancelled(self, waiting: _Waiting) -> None:
        if self._lost is None:
            self._forget(waiting)

    def _time_out(self, waiting: _Waiting) -> None:
        if self._forget(waiting):
            text = f"request {waiting.request.id!r}: no result within {waiting.timeout_s:g} s"
            _fail(waiting.future, RequestTimeout(text))

    def _lose(self, error: CoordinatorLost) -> None:
        self._lost = error
        for waiting in self._waiting.values():
            _fail(waiting.future, error)
        self._waiting.clear()
        for answer in self._answers.values():
            _fail(answer, error)
        self._answers.clear()

    def _end(self) -> None:
        self._ended = True
        if self._lost is None:
            self._link.send("DISCONNECT")
            self._lost = CoordinatorLost("this client has been closed")
        for waiting in self._waiting.values():
            waiting.future.cancel()
        for answer in self._answers.values():
            answer.cancel()


def _error(fields: dict[str, Any]) -> InferenceError:
    return BY_KIND.get(fields["kind"], InferenceError)(fields["message"])


def _finish(future: "Future[Any]", value: object) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _fail(future: "Future[Any]", error: Exception) -> None:
    if not future.cancelled() and future.set_running_or_notify_cancel():
        future.set_exception(error)
