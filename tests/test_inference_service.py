"""A service of real processes: what clients get, the life cycle, and what bad clients do."""

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from scenarios.inference.async_client import AsyncClient
from scenarios.inference.client import Client
from scenarios.inference.errors import CoordinatorLost, Refused, RequestTimeout, Stopped
from scenarios.inference.messages import HEADER, encode
from scenarios.inference.model_files import FrozenModel
from scenarios.inference.request import Request, Sampling
from scenarios.inference.service import Service, ServiceConfig
from scenarios.layout import Layout
from tests.inference_cases import SMALL, Results, make_engine, run_all, small_model, small_requests
from tests.inference_services import TIMEOUT_S, Raw, bits, bits_of, small_service

REQUESTS = small_requests(12)
LONG = Request(id="long", prompt=(1, 2, 3), sampling=Sampling(max_new_tokens=60))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: FrozenModel) -> Results:
    return run_all(make_engine(model), [*REQUESTS, LONG])


@pytest.fixture(scope="module")
def service(model: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with small_service(model, "dp2", folder / "run") as service:
        yield service
    assert service.failures == []


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.address, TIMEOUT_S) as client:
        yield client


def blocks_in_use(client: Client) -> int:
    """Of all replicas, when nothing is left to do."""
    while True:
        status = client.command("STATUS")
        if not status["queued"] and not any(r["num_requests"] for r in status["replicas"]):
            return sum(replica["blocks_in_use"] for replica in status["replicas"])
        time.sleep(0.01)


def test_completions_are_those_of_one_engine(client: Client, expected: Results) -> None:
    futures = [client.submit(request) for request in REQUESTS]
    done = [future.result(TIMEOUT_S) for future in futures]
    for request, completion in zip(REQUESTS, done, strict=True):
        assert bits(completion) == bits_of(expected, request.id)
        assert not completion.retried
    assert {completion.replica for completion in done} == {0, 1}
    assert blocks_in_use(client) == 0


def test_streams(client: Client, expected: Results) -> None:
    assert list(client.stream(LONG)) == expected.tokens["long"]
    stream = client.stream(LONG)
    assert next(stream) == expected.tokens["long"][0]
    stream.close()  # type: ignore[attr-defined]
    assert blocks_in_use(client) == 0
    assert client.generate(LONG).tokens == expected.tokens["long"]


def test_asyncio(client: Client, expected: Results) -> None:
    async def play() -> None:
        service = AsyncClient(client)
        tasks = [asyncio.create_task(service.generate(request)) for request in REQUESTS]
        streamed = [token async for token in service.stream(LONG)]
        assert streamed == expected.tokens["long"]
        for request, done in zip(REQUESTS, await asyncio.gather(*tasks), strict=True):
            assert bits(done) == bits_of(expected, request.id)
        task = asyncio.create_task(service.generate(LONG))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await service.command("STATUS"))["state"] == "RUNNING"

    asyncio.run(asyncio.wait_for(play(), TIMEOUT_S))
    assert blocks_in_use(client) == 0


def test_suspension_in_the_middle_changes_nothing(client: Client, expected: Results) -> None:
    some = iter(client.stream(LONG))
    assert next(some) == expected.tokens["long"][0]
    futures = [client.submit(request) for request in REQUESTS]
    assert client.command("PAUSE")["state"] == "PAUSED"
    late = client.submit(Request(id="late", prompt=(4,)))
    with pytest.raises(Refused, match="the service is PAUSED, expected SUSPENDED"):
        client.command("RESUME")
    suspended = client.command("SUSPEND")
    assert [replica["state"] for replica in suspended["replicas"]] == ["SUSPENDED"] * 2
    assert [replica["blocks_in_use"] for replica in suspended["replicas"]] == [0, 0]
    assert not late.done()
    with pytest.raises(Refused, match="the service is SUSPENDED, expected PAUSED"):
        client.command("UNPAUSE")
    assert client.command("RESUME")["state"] == "PAUSED"
    assert client.command("UNPAUSE")["state"] == "RUNNING"
    assert list(some) == expected.tokens["long"][1:]
    for request, future in zip(REQUESTS, futures, strict=True):
        assert bits(future.result(TIMEOUT_S)) == bits_of(expected, request.id)
    assert late.result(TIMEOUT_S).reason == "length"
    assert blocks_in_use(client) == 0


def test_deadline_and_cancel(client: Client) -> None:
    client.command("PAUSE")
    try:
        with pytest.raises(RequestTimeout, match=r"request 'long': no result within 0\.05 s"):
            client.generate(LONG, timeout_s=0.05)
        future = client.submit(LONG)
        twice = client.submit(LONG)
        with pytest.raises(Refused, match="this id is in use"):
            twice.result(TIMEOUT_S)
        assert future.cancel()
        client.submit(LONG).cancel()
        assert client.command("STATUS")["queued"] == 0
    finally:
        client.command("UNPAUSE")
    assert blocks_in_use(client) == 0


def test_a_closed_client_says_so(service: Service) -> None:
    client = Client(service.address, TIMEOUT_S)
    client.command("PAUSE")
    future = client.submit(LONG)
    assert client.command("UNPAUSE")["state"] == "RUNNING"
    waiting = client.submit(LONG.model_copy(update={"id": "more"}), timeout_s=TIMEOUT_S)
    client.close()
    client.close()
    for one in (future, waiting):
        assert one.cancelled() or one.done()
    with pytest.raises(CoordinatorLost, match="this client has been closed"):
        client.generate(LONG)
    with pytest.raises(CoordinatorLost, match="this client has been closed"):
        client.command("STATUS")


def test_an_error_of_a_callback_ends_its_request_alone(client: Client, expected: Results) -> None:
    def fail(tokens: list[int]) -> None:
        raise KeyError("mine")

    failing, other = client.submit(LONG, on_tokens=fail), client.submit(REQUESTS[0])
    with pytest.raises(KeyError, match="mine"):
        failing.result(TIMEOUT_S)
    assert bits(other.result(TIMEOUT_S)) == bits_of(expected, REQUESTS[0].id)
    assert client.generate(LONG).tokens == expected.tokens["long"]


def test_what_cannot_be_generated_is_refused(client: Client, expected: Results) -> None:
    wrong = [
        (Request(id="a", prompt=(1,) * 60), "up to 16 new ones, expected at most 64"),
        (Request(id="b", prompt=(1, 200)), "got token 200, expected less than 96"),
        (Request(id="c", prompt=(1,), sampling=Sampling(stop_strings=("x",))), "no tokenizer.json"),
    ]
    for request, message in wrong:
        with pytest.raises(Refused, match=message):
            client.generate(request)
    assert client.generate(LONG).tokens == expected.tokens["long"]


def test_bad_messages_harm_nobody(service: Service, client: Client, expected: Results) -> None:
    future = client.submit(LONG)
    raw = Raw(service.address)
    for frames, message in (
        ((b"",), "got 1 frames"),
        ((b"nonsense", b"\x00"), "got header"),
        ((b"TBI\x09", b"\x00"), "got version"),
        ((HEADER, b"\xc1\xff"), "no msgpack"),
        ((HEADER, msgpack.packb(["DANCE", {}])), "unknown type"),
        ((HEADER, msgpack.packb(["SUBMIT", {"request": 3, "stream": True}])), "request: got int"),
        (tuple(encode("STEP", entries=[])), "no registered replica"),
        (tuple(encode("REGISTER", secret="", replica=0)), "another secret"),
        (tuple(encode("LOST", secret="x", replica=0, message="")), "another secret"),
    ):
        kind, fields = raw.ask(*frames)
        assert (kind, fields["kind"]) == ("ERROR", "refused")
        assert message in fields["message"]
    request = {"id": "x", "prompt": [1] * 99}
    _, fields = raw.say("SUBMIT", request=request, stream=False)
    assert fields["id"] == "x"
    raw.close()
    host, port = service.address.removeprefix("tcp://").split(":")
    assert host == "127.0.0.1"
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    assert future.result(TIMEOUT_S).tokens == expected.tokens["long"]


def test_a_client_that_vanishes_is_forgotten(service: Service, client: Client) -> None:
    client.command("PAUSE")
    raw = Raw(service.address)
    for number in range(50):
        request = LONG.model_copy(update={"id": f"v{number}"}).model_dump(mode="json")
        raw.socket.send_multipart(encode("SUBMIT", request=request, stream=True))
    while raw.say("STATUS", ask=1)[0] != "STATE":  # but PING
        pass
    assert client.command("STATUS")["queued"] == 50
    raw.close()
    deadline_s = time.monotonic() + TIMEOUT_S
    while client.command("STATUS")["queued"] and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert client.command("STATUS")["queued"] == 0
    client.command("UNPAUSE")
    assert blocks_in_use(client) == 0


def test_nobody_there(model: FrozenModel, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(CoordinatorLost, match="has gone or was never there"):
        Client(address, TIMEOUT_S)
    with pytest.raises(ValueError, match="got address 'nonsense'"):
        Client("nonsense")
    config = ServiceConfig(model.folder, model.config, Layout(), SMALL, "tcp://192.0.2.1:1")
    with pytest.raises(ValueError, match=r"192\.0\.2\.1:1 cannot be bound"):
        Service(config, tmp_path)


def test_ten_thousand_requests_wait_and_end_with_the_service(
    model: FrozenModel, tmp_path: Path
) -> None:
    with small_service(model, "dp1", tmp_path / "run") as service:
        with (
            Client(service.address, TIMEOUT_S) as client,
            Client(service.address, TIMEOUT_S) as other,
        ):
            client.command("PAUSE")
            requests = [LONG.model_copy(update={"id": f"r{i}"}) for i in range(10_000)]
            futures = [client.submit(request) for request in requests]
            assert client.command("STATUS")["queued"] == 10_000
            assert other.command("STATUS")["state"] == "PAUSED"
            assert other.command("STOP")["state"] == "STOPPED"
            errors: list[Any] = [future.exception(TIMEOUT_S) for future in futures]
            assert {type(error) for error in errors} == {Stopped}
            assert "'r9999'" in str(errors[-1])
        assert service.wait(TIMEOUT_S)
    assert service.failures == []
