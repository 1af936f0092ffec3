"""What the coordinator does with each message of clients and replicas.

Requests wait here in order of arrival; each goes to the replica with the fewest, of equal ones the
lowest, as long as that has less than its share. When a replica is lost, its requests go to another
one once. The results are the same, since they depend on the request alone.
"""

import hmac
import time
import traceback
from collections import deque
from typing import Any

import zmq

from scenarios.inference.messages import MESSAGES, BadMessage, decode, encode
from scenarios.inference.request import Request, check_request
from scenarios.inference.tickets import Replica, Ticket
from scenarios.inference_config import EngineConfig
from scenarios.scenario import ModelConfig

SILENCE_S = 120.0
"""A replica that gives no sign of life for so long is given up; the launcher tells of deaths."""
STOP_S = 10.0
"""How long replicas have to end after STOP."""
MAX_QUEUED = 100_000
# Command -> (states that it is allowed in, the state that it leads to).
TRANSITIONS = {
    "PAUSE": (("RUNNING",), "PAUSED"),
    "UNPAUSE": (("PAUSED",), "RUNNING"),
    "SUSPEND": (("PAUSED",), "SUSPENDED"),
    "RESUME": (("SUSPENDED",), "PAUSED"),
    "STOP": (("RUNNING", "PAUSED", "SUSPENDED"), "STOPPED"),
}


class Coordinator:
    """The state of the service and what each message does to it.

    Args:
        socket: a bound ROUTER with ROUTER_MANDATORY.
        model, config: for checking requests before they wait.
        has_tokenizer: whether the model has one; for the same.
        num_replicas: that will register.
        secret: replicas and the launcher prove themselves by it.
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        model: ModelConfig,
        config: EngineConfig,
        has_tokenizer: bool,
        num_replicas: int,
        secret: str,
    ):
        self._socket = socket
        self._model, self._config, self._has_tokenizer = model, config, has_tokenizer
        self._num_replicas, self._secret = num_replicas, secret
        self._share = 2 * config.max_running
        self.state = "RUNNING"
        self._replicas: dict[int, Replica] = {}
        self._lost: dict[int, str] = {}
        self._queue: deque[Ticket] = deque()
        self._tickets: dict[str, Ticket] = {}
        self._by_client: dict[tuple[bytes, str], Ticket] = {}
        self._num_tickets = 0
        self._asked: list[tuple[bytes, int, str]] = []
        """Clients that wait for a state, the number of their question, and the state."""
        self._stopped_s = 0.0

    def receive(self, identity: bytes, frames: list[bytes]) -> None:
        """Obeys one message; a bad one is answered by ERROR and changes nothing."""
        fields: dict[str, Any] = {}
        try:
            kind, fields = decode(frames)
            sender = MESSAGES[kind].sender
            if sender == "coordinator":
                raise BadMessage(f"{kind} is sent by the coordinator only")
            if sender == "replica" and kind != "REGISTER":
                self._from_replica(self._registered(identity, kind), kind, fields)
            else:
                handler = getattr(self, f"_on_{kind.lower()}", self._on_command)
                handler(identity, kind, fields)
        except ValueError as error:
            self._error(identity, "", "refused", str(error), fields.get("ask", 0))
        except Exception as error:  # the service lives on, whatever one message does
            traceback.print_exc()
            text = f"a bug in the coordinator: {type(error).__name__}: {error}"
            self._error(identity, "", "refused", text, fields.get("ask", 0))

    @property
    def ended(self) -> bool:
        """Whether it was stopped and all replicas have ended, or had the time to."""
        late = time.monotonic() - self._stopped_s > STOP_S
        return self.state == "STOPPED" and (late or not self._replicas)

    def say_goodbye(self) -> None:
        """Answers those who asked for the end."""
        for identity, ask, _ in self._asked:
            self._tell_state(identity, ask)

    # -- clients ---------------------------------------------------------------------------------

    def _on_connect(self, identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        model = self._model.model_dump(mode="json")
        self._send(identity, "ACK", ask=fields["ask"], state=self.state, model=model)

    def _on_submit(self, identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        given = fields["request"].get("id")
        name = given if isinstance(given, str) else ""
        try:
            request = Request.build(**{str(key): value for key, value in fields["request"].items()})
            has_tokenizer = self._has_tokenizer
            check_request(request, self._model, self._config, has_tokenizer=has_tokenizer)
            if (identity, request.id) in self._by_client:
                raise ValueError(f"request {request.id!r}: this id is in use by this client")
            if len(self._queue) >= MAX_QUEUED:
                raise ValueError(f"request {request.id!r}: {MAX_QUEUED} requests wait already")
        except (TypeError, ValueError) as error:
            self._error(identity, name, "refused", str(error))
            return
        if self.state == "STOPPED":
            self._error(identity, name, "stopped", "the service has been stopped")
            return
        self._num_tickets += 1
        ticket = Ticket(str(self._num_tickets), identity, request, fields["stream"])
        self._tickets[ticket.number] = self._by_client[identity, request.id] = ticket
        self._queue.append(ticket)
        self._fail_if_no_replica_is_left()

    def _on_abort(self, identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        ticket = self._by_client.get((identity, fields["id"]))
        if ticket is not None:  # it may have ended meanwhile
            self._drop(ticket)

    def _on_status(self, identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        self._tell_state(identity, fields["ask"])

    def _on_disconnect(self, identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        self._forget_client(identity)

    def _on_command(self, identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        allowed, state = TRANSITIONS[kind]
        if self.state not in allowed:
            expected = " or ".join(allowed)
            raise ValueError(f"{kind}: the service is {self.state}, expected {expected}")
        self.state = state
        if state == "STOPPED":
            self._stopped_s = time.monotonic()
            for ticket in list(self._tickets.values()):
                self._fail(ticket, "stopped", f"request {ticket.request.id!r}: service stopped")
        for replica in self._replicas.values():
            self._send(replica.identity, "ENTER", state=state)
        self._asked.append((identity, fields["ask"], state))
        self._tell_who_asked()

    def _forget_client(self, identity: bytes) -> None:
        for ticket in [t for t in self._tickets.values() if t.client == identity]:
            self._drop(ticket)

    # -- replicas --------------------------------------------------------------------------------

    def _registered(self, identity: bytes, kind: str) -> Replica:
        for replica in self._replicas.values():
            if replica.identity == identity:
                return replica
        raise BadMessage(f"{kind}: got it from {identity.hex()}, which is no registered replica")

    def _check_secret(self, kind: str, fields: dict[str, Any]) -> int:
        if not hmac.compare_digest(fields["secret"], self._secret):
            raise BadMessage(f"{kind}: got another secret than the launcher's")
        index: int = fields["replica"]
        if not 0 <= index < self._num_replicas:
            raise BadMessage(f"{kind}: got replica {index} of {self._num_replicas}")
        return index

    def _on_register(self, identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        index = self._check_secret(kind, fields)
        if index in self._replicas or index in self._lost:
            raise BadMessage(f"REGISTER: replica {index} has registered before")
        self._replicas[index] = Replica(index, identity, time.monotonic())
        # One that comes late is told the state that the others are in.
        self._send(identity, "ENTER", state=self.state)

    def _on_lost(self, identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        self._lose(self._check_secret(kind, fields), fields["message"])

    def _from_replica(self, replica: Replica, kind: str, fields: dict[str, Any]) -> None:
        replica.heard_s = time.monotonic()
        if kind == "BEAT":
            replica.status = fields
            if not fields["num_requests"]:
                replica.dropped.clear()
            if fields["state"] == "STOPPED":
                del self._replicas[replica.index]
            self._tell_who_asked()
            return
        errors = []
        for entry in fields["entries"]:
            try:
                self._progress(replica, entry)
            except BadMessage as error:
                errors.append(error)  # the others are none the worse for it
        if errors:
            raise errors[0]

    def _progress(self, replica: Replica, entry: Any) -> None:
        wanted = (str, int, int | None, float, str, list, str | None)
        if not (isinstance(entry, list) and len(entry) == len(wanted)) or not all(
            map(isinstance, entry, wanted)
        ):
            raise BadMessage(f"STEP: got an entry {str(entry)[:80]}, expected 7 values")
        number, first, token, log_prob, digest, prompt_log_probs, reason = entry
        ticket = replica.pending.get(number)
        if ticket is None:
            if number in replica.dropped:
                return
            raise BadMessage(
                f"STEP: ticket {number[:20]!r} has ended or is not yours, expected none"
            )
        if first != len(ticket.tokens):
            raise BadMessage(
                f"STEP: ticket {number}: got token {first}, expected {len(ticket.tokens)}"
            )
        ticket.prompt_log_probs += prompt_log_probs
        if token is not None:
            ticket.tokens.append(token)
            ticket.log_probs.append(log_prob)
            ticket.digests.append(digest)
        # After a retry the client knows the first tokens already.
        first = ticket.num_sent
        if ticket.stream and len(ticket.tokens) > first:
            ticket.num_sent = len(ticket.tokens)
            new = {"tokens": ticket.tokens[first:], "log_probs": ticket.log_probs[first:]}
            self._send(ticket.client, "PARTIAL", id=ticket.request.id, first=first, **new)
        if reason is not None and ticket.number in self._tickets:
            self._finish(ticket, reason)

    def _finish(self, ticket: Ticket, reason: str) -> None:
        assert ticket.replica is not None
        ticket.replica.num_done += 1
        name = ticket.request.id
        if reason == "not finite":
            place = len(ticket.tokens)
            message = f"request {name!r}: the logits of its token {place} are not finite"
            self._fail(ticket, "failed", message)
            return
        self._remove(ticket)
        self._send(
            ticket.client,
            "REPLY",
            id=name,
            tokens=ticket.tokens,
            log_probs=ticket.log_probs,
            prompt_log_probs=ticket.prompt_log_probs,
            digests=ticket.digests,
            reason=reason,
            replica=ticket.replica.index,
            retried=ticket.retried,
        )

    def _lose(self, index: int, message: str) -> None:
        if index in self._lost:
            return
        self._lost[index] = message
        replica = self._replicas.pop(index, None)
        if replica is not None:
            # In order of arrival, before those that wait.
            for ticket in reversed(list(replica.pending.values())):
                ticket.replica = None
                if ticket.number not in self._tickets:
                    continue  # its client was found to have gone just now
                if ticket.retried:
                    name = ticket.request.id
                    text = f"request {name!r}: lost with a replica for the second time: {message}"
                    self._fail(ticket, "replica lost", text)
                else:
                    ticket.retried = True
                    ticket.forget_results()
                    self._queue.appendleft(ticket)
        self._fail_if_no_replica_is_left()
        self._tell_who_asked()

    def _fail_if_no_replica_is_left(self) -> None:
        if len(self._lost) < self._num_replicas:
            return
        why = "; ".join(self._lost.values())
        for ticket in list(self._tickets.values()):
            text = f"request {ticket.request.id!r}: no replica is left: {why}"
            self._fail(ticket, "replica lost", text)

    # -- both ------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Gives waiting requests to replicas."""
        # The first replica to come shall not take what is for all.
        if self.state != "RUNNING" or len(self._replicas) + len(self._lost) < self._num_replicas:
            return
        while self._queue and self._replicas:
            replica = min(self._replicas.values(), key=lambda r: (len(r.pending), r.index))
            if len(replica.pending) >= self._share:
                return
            ticket = self._queue.popleft()
            ticket.replica = replica
            replica.pending[ticket.number] = ticket
            request = ticket.request.model_dump(mode="json")
            self._send(replica.identity, "WORK", ticket=ticket.number, request=request)

    def watch(self) -> None:
        """Finds clients that have gone and replicas that are silent."""
        for client in {ticket.client for ticket in self._tickets.values()}:
            self._send(client, "PING")
        now = time.monotonic()
        for replica in list(self._replicas.values()):
            if now - replica.heard_s > SILENCE_S:
                message = f"replica {replica.index} was silent for {SILENCE_S:g} s"
                self._send(replica.identity, "ENTER", state="STOPPED")
                self._lose(replica.index, message)

    def _remove(self, ticket: Ticket) -> bool:
        """Whether it was there; sending to a client that has gone removes all its tickets."""
        if self._tickets.pop(ticket.number, None) is None:
            return False
        del self._by_client[ticket.client, ticket.request.id]
        if ticket.replica is not None:
            ticket.replica.pending.pop(ticket.number, None)
        elif ticket in self._queue:
            self._queue.remove(ticket)
        return True

    def _fail(self, ticket: Ticket, kind: str, message: str) -> None:
        if self._remove(ticket):
            if ticket.replica is not None:
                ticket.replica.dropped.add(ticket.number)
            self._error(ticket.client, ticket.request.id, kind, message)

    def _drop(self, ticket: Ticket) -> None:
        """Forgets a request that nobody waits for."""
        if self._remove(ticket) and ticket.replica is not None:
            ticket.replica.dropped.add(ticket.number)
            self._send(ticket.replica.identity, "DROP", ticket=ticket.number)

    def _tell_who_asked(self) -> None:
        """Answers commands whose state every replica has reached, or that came to nothing."""
        waiting = []
        for identity, ask, state in self._asked:
            there = all(r.status["state"] == state for r in self._replicas.values())
            if there or state != self.state:
                self._tell_state(identity, ask)
            else:
                waiting.append((identity, ask, state))
        self._asked = waiting

    def _tell_state(self, identity: bytes, ask: int) -> None:
        replicas = [
            {"replica": r.index, "done": r.num_done, "pending": len(r.pending), **r.status}
            for r in self._replicas.values()
        ]
        replicas += [{"replica": index, "lost": message} for index, message in self._lost.items()]
        replicas.sort(key=lambda replica: replica["replica"])
        told = {"state": self.state, "queued": len(self._queue), "replicas": replicas}
        self._send(identity, "STATE", ask=ask, **told)

    def _error(self, identity: bytes, name: str, kind: str, message: str, ask: int = 0) -> None:
        self._send(identity, "ERROR", id=name, ask=ask, kind=kind, message=message)

    def _send(self, identity: bytes, kind: str, /, **fields: Any) -> None:
        try:
            self._socket.send_multipart([identity, *encode(kind, **fields)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            # A replica's end is the launcher's to tell; a client that has gone wants nothing.
            if all(replica.identity != identity for replica in self._replicas.values()):
                self._asked = [asked for asked in self._asked if asked[0] != identity]
                self._forget_client(identity)
