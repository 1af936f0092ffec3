"""The coordinator alone, on a socket that only remembers: whatever happens, every request ends."""

from typing import Any

import pytest
import zmq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scenarios.inference.coordinator import Coordinator
from scenarios.inference.messages import decode, encode
from scenarios.scenario import ModelConfig
from tests.inference_cases import SIZES, SMALL

SECRET = "0123"
NUM_REPLICAS = 3
STOPPING = {"id": "x", "prompt": [1], "sampling": {"stop_strings": ["."]}}


class FakeSocket:
    """Who got what; peers in ``gone`` cannot be reached."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, str, dict[str, Any]]] = []
        self.gone: set[bytes] = set()

    def send_multipart(self, frames: list[bytes], flags: int) -> None:
        if frames[0] in self.gone:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self.sent.append((frames[0], *decode(frames[1:])))

    def take(self, identity: bytes) -> list[tuple[str, dict[str, Any]]]:
        taken = [(kind, fields) for to, kind, fields in self.sent if to == identity]
        self.sent = [message for message in self.sent if message[0] != identity]
        return taken


def make_coordinator(socket: FakeSocket, num_replicas: int = NUM_REPLICAS) -> Coordinator:
    config = SMALL.model_copy(update={"max_running": 2})
    model = ModelConfig.build(**SIZES)
    fake: Any = socket
    return Coordinator(fake, model, config, False, num_replicas, SECRET)


def request_of(name: str, num_tokens: int = 2) -> dict[str, Any]:
    return {"id": name, "prompt": [1, 2], "sampling": {"max_new_tokens": num_tokens}}


def register(coordinator: Coordinator, index: int) -> None:
    """A replica comes."""
    coordinator.receive(b"replica%d" % index, encode("REGISTER", secret=SECRET, replica=index))


def submit(coordinator: Coordinator, client: bytes, name: str, stream: bool = False) -> None:
    """A client asks."""
    coordinator.receive(client, encode("SUBMIT", request=request_of(name), stream=stream))


class Service(RuleBasedStateMachine):
    """Clients, replicas and losses in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.socket = FakeSocket()
        self.coordinator = make_coordinator(self.socket)
        self.replicas: dict[int, dict[str, int]] = {}  # ticket -> tokens sent
        self.num_registered = 0
        self.lost: set[int] = set()
        self.open: set[tuple[bytes, str]] = set()
        self.ended: set[tuple[bytes, str]] = set()
        self.given: dict[str, set[int]] = {}
        """Ticket -> the replicas that were given it."""
        self.streams: dict[tuple[bytes, str], list[int]] = {}

    def tell(self, identity: bytes, kind: str, **fields: Any) -> None:
        self.coordinator.receive(identity, encode(kind, **fields))
        self.settle()

    def settle(self) -> None:
        """Replicas and clients take in what they were sent."""
        self.coordinator.dispatch()
        for index in list(self.replicas):
            for kind, fields in self.socket.take(b"replica%d" % index):
                if kind == "WORK":
                    self.replicas[index][fields["ticket"]] = 0
                    self.given.setdefault(fields["ticket"], set()).add(index)
                elif kind == "DROP":
                    self.replicas[index].pop(fields["ticket"])
                else:
                    assert kind == "ENTER"
        for client in (b"A", b"B"):
            for kind, fields in self.socket.take(client):
                if kind in ("STATE", "PING"):
                    continue
                key = (client, fields["id"])
                if kind == "PARTIAL":
                    stream = self.streams.setdefault(key, [])
                    assert fields["first"] == len(stream)
                    stream += fields["tokens"]
                elif kind in ("REPLY", "ERROR"):
                    assert key in self.open, (kind, fields)
                    self.open.remove(key)
                    self.ended.add(key)
                    if kind == "REPLY":
                        assert fields["tokens"] == [0, 1]
                        assert fields["log_probs"] == [-0.5, -1.5]
                        assert self.streams.pop(key, [0, 1]) == [0, 1]
                    else:
                        assert fields["kind"] == "replica lost"

    @rule(client=st.sampled_from([b"A", b"B"]), number=st.integers(0, 12), stream=st.booleans())
    def submit(self, client: bytes, number: int, stream: bool) -> None:
        key = (client, f"r{number}")
        if key not in self.open:
            self.open.add(key)
            self.streams.pop(key, None)
            self.tell(client, "SUBMIT", request=request_of(key[1]), stream=stream)

    @precondition(lambda self: self.num_registered < NUM_REPLICAS)
    @rule()
    def register(self) -> None:
        index = self.num_registered
        self.num_registered += 1
        self.replicas[index] = {}
        self.tell(b"replica%d" % index, "REGISTER", secret=SECRET, replica=index)

    def next_entries(self, index: int) -> list[Any]:
        """A token, 0 and then 1, for each request of a replica."""
        entries: list[Any] = []
        for ticket, first in list(self.replicas[index].items()):
            reason = "length" if first == 1 else None
            entries.append([ticket, first, first, -0.5 - first, "00", [], reason])
            self.replicas[index][ticket] += 1
            if reason:
                del self.replicas[index][ticket]
        return entries

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.replicas)))
        entries = self.next_entries(index)
        twice = data.draw(st.booleans())
        self.tell(b"replica%d" % index, "STEP", entries=entries)
        if twice:  # nobody gets anything from it but this replica, if at all
            self.coordinator.receive(b"replica%d" % index, encode("STEP", entries=entries))
            taken = self.socket.take(b"replica%d" % index)
            assert all(kind in ("ERROR", "WORK") for kind, _ in taken)
            for kind, fields in taken:
                assert kind == "ERROR"
                assert "expected" in fields["message"]
            self.settle()

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.replicas)))
        del self.replicas[index]
        self.socket.gone.add(b"replica%d" % index)
        self.lost.add(index)
        self.tell(b"launcher", "LOST", secret=SECRET, replica=index, message="killed")

    @rule(client=st.sampled_from([b"A", b"B"]), number=st.integers(0, 12))
    def abort(self, client: bytes, number: int) -> None:
        key = (client, f"r{number}")
        self.open.discard(key)
        self.streams.pop(key, None)
        self.tell(client, "ABORT", id=key[1])

    @rule(command=st.sampled_from(["PAUSE", "UNPAUSE"]))
    def toggle(self, command: str) -> None:
        wanted = {"PAUSE": "RUNNING", "UNPAUSE": "PAUSED"}[command]
        if self.coordinator.state == wanted:
            self.tell(b"C", command, ask=1)
            self.socket.take(b"C")

    @invariant()
    def nobody_is_given_a_request_a_third_time(self) -> None:
        assert all(len(replicas) <= 2 for replicas in self.given.values())

    def teardown(self) -> None:
        """Whatever happened, it goes on, and every request ends."""
        if self.coordinator.state == "PAUSED":
            self.tell(b"C", "UNPAUSE", ask=1)
        while self.num_registered < NUM_REPLICAS:
            self.register()
        for _ in range(200):
            for index in list(self.replicas):
                self.tell(b"replica%d" % index, "STEP", entries=self.next_entries(index))
        assert not self.open
        assert not self.coordinator._tickets
        assert not self.coordinator._by_client


TestService = Service.TestCase
TestService.settings = settings(max_examples=60, stateful_step_count=30)


def test_least_pending_ties_to_the_lowest() -> None:
    socket = FakeSocket()
    coordinator = make_coordinator(socket)
    for index in reversed(range(NUM_REPLICAS)):
        register(coordinator, index)
    for number in range(7):
        submit(coordinator, b"A", f"r{number}")
    coordinator.dispatch()
    given = [to for to, kind, _ in socket.sent if kind == "WORK"]
    assert given == [b"replica%d" % (i % NUM_REPLICAS) for i in range(7)]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("REGISTER", {"secret": "no", "replica": 0}, "another secret"),
        ("REGISTER", {"secret": SECRET, "replica": 9}, "got replica 9 of 3"),
        ("LOST", {"secret": "no", "replica": 0, "message": ""}, "another secret"),
        ("STEP", {"entries": []}, "no registered replica"),
        ("WORK", {"ticket": "1", "request": {}}, "sent by the coordinator only"),
        ("SUBMIT", {"request": {"cls": 1}, "stream": False}, "cls"),
        ("SUBMIT", {"request": {"id": "x", "prompt": [1] * 99}, "stream": False}, "at most 64"),
        ("SUBMIT", {"request": {"id": "x", "prompt": [-1]}, "stream": False}, "prompt.0"),
        ("SUBMIT", {"request": STOPPING, "stream": False}, "the model has no tokenizer.json"),
        ("RESUME", {"ask": 7}, "the service is RUNNING, expected SUSPENDED"),
    ],
)
def test_refuses_and_lives_on(kind: str, fields: dict[str, Any], message: str) -> None:
    socket = FakeSocket()
    coordinator = make_coordinator(socket)
    coordinator.receive(b"A", encode(kind, **fields))
    ((to, answer, content),) = socket.sent
    assert (to, answer, content["kind"]) == (b"A", "ERROR", "refused")
    assert message in content["message"]
    assert content["ask"] == fields.get("ask", 0)
    assert "bug" not in content["message"]
    coordinator.receive(b"A", encode("STATUS", ask=1))
    assert socket.sent[-1][1] == "STATE"


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        ["99", 0, 1, -1.0, "", [], None],
        ["1", 5, 1, -1.0, "", [], None],
        ["1", 0, "x", -1.0, "", [], None],
        [[], 0, 1, -1.0, "", [], None],
        ["1", 0, 1, -1.0, "", 7, None],
    ],
)
def test_refuses_a_bad_step(entry: Any) -> None:
    socket = FakeSocket()
    coordinator = make_coordinator(socket, 1)
    register(coordinator, 0)
    submit(coordinator, b"A", "r", stream=True)
    coordinator.dispatch()
    socket.take(b"replica0")
    good = ["1", 0, 7, -1.0, "00", [], None]
    coordinator.receive(b"replica0", encode("STEP", entries=[entry, good, good]))
    ((kind, content),) = socket.take(b"replica0")
    assert kind == "ERROR"
    assert "STEP" in content["message"]
    ((kind, content),) = socket.take(b"A")
    assert (kind, content["tokens"]) == ("PARTIAL", [7])


def test_a_replica_that_comes_late_is_told_the_state() -> None:
    socket = FakeSocket()
    coordinator = make_coordinator(socket, 2)
    submit(coordinator, b"A", "r")
    register(coordinator, 0)
    coordinator.receive(b"A", encode("PAUSE", ask=1))
    coordinator.dispatch()
    states = [fields["state"] for _, fields in socket.take(b"replica0")]
    assert states == ["RUNNING", "PAUSED"]
    register(coordinator, 1)
    assert socket.take(b"replica1") == [("ENTER", {"state": "PAUSED"})]
    coordinator.receive(b"A", encode("UNPAUSE", ask=2))
    coordinator.dispatch()
    assert [kind for kind, _ in socket.take(b"replica0")] == ["ENTER", "WORK"]
    register(coordinator, 1)
    kinds = [kind for kind, _ in socket.take(b"replica1")]
    assert kinds == ["ENTER", "ERROR"]  # it has registered before


def test_a_client_that_has_gone_is_forgotten() -> None:
    socket = FakeSocket()
    coordinator = make_coordinator(socket, 1)
    register(coordinator, 0)
    for number in range(20):
        submit(coordinator, b"A", f"r{number}")
    submit(coordinator, b"B", "r0")
    coordinator.dispatch()
    socket.gone.add(b"A")
    coordinator.watch()
    kinds = [kind for kind, _ in socket.take(b"replica0")]
    assert kinds.count("DROP") == kinds.count("WORK") == 4  # its share
    coordinator.dispatch()
    ((_, fields),) = socket.take(b"replica0")
    assert fields["request"]["id"] == "r0"
    assert len(coordinator._tickets) == 1
