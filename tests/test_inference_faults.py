"""Processes of a service are killed while requests run: every future ends, and nothing is left."""

import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from scenarios.inference.client import Client, Completion
from scenarios.inference.errors import CoordinatorLost, ReplicaLost
from scenarios.inference.model_files import FrozenModel
from scenarios.inference.service import Service
from tests.inference_cases import Results, make_engine, run_all, small_model, small_requests
from tests.inference_services import TIMEOUT_S, bits, bits_of, small_service

REQUESTS = small_requests(32, max_new_tokens=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: FrozenModel) -> Results:
    return run_all(make_engine(model), REQUESTS)


def submit_all(client: Client) -> "list[Future[Completion]]":
    """Returns when tokens are coming, but not all."""
    some = threading.Event()
    futures = [client.submit(r, on_tokens=lambda tokens: some.set()) for r in REQUESTS]
    assert some.wait(TIMEOUT_S)
    return futures


def kill(service: Service, *names: str) -> None:
    for name in names:
        os.kill(service.processes[name], signal.SIGKILL)


@pytest.mark.parametrize(
    ("layout", "victims"),
    [
        ("tp2,dp2", ["replica1_rank1"]),
        ("pp2,dp2", ["replica0_rank0", "replica0_rank1"]),
    ],
)
def test_another_replica_tries_again(
    model: FrozenModel, expected: Results, tmp_path: Path, layout: str, victims: list[str]
) -> None:
    lost = int(victims[0][len("replica")])
    with (
        small_service(model, layout, tmp_path / "run") as service,
        Client(service.address, TIMEOUT_S) as client,
    ):
        futures = submit_all(client)
        kill(service, *victims)
        done = [future.result(TIMEOUT_S) for future in futures]
        for request, completion in zip(REQUESTS, done, strict=True):
            assert bits(completion) == bits_of(expected, request.id)
        # How many had to be is a matter of time; the test below leaves no choice.
        assert {c.replica for c in done if c.retried} <= {1 - lost}
        status = client.command("STATUS")
        assert "was killed by SIGKILL" in status["replicas"][lost]["lost"]
        assert status["replicas"][1 - lost]["blocks_in_use"] == 0
        # What is asked now is answered by the one that is left.
        assert client.generate(REQUESTS[0]).replica == 1 - lost
    assert len(service.failures) == 1
    assert victims[0][:8] in service.failures[0]


def test_each_request_is_tried_again_once_and_none_without_replicas(
    model: FrozenModel, expected: Results, tmp_path: Path
) -> None:
    with (
        small_service(model, "dp2", tmp_path / "run") as service,
        Client(service.address, TIMEOUT_S) as client,
    ):
        client.command("PAUSE")
        futures = [client.submit(request) for request in REQUESTS]
        os.kill(service.processes["replica1_rank0"], signal.SIGSTOP)
        unpause = threading.Thread(target=client.command, args=("UNPAUSE",))
        unpause.start()  # the replica that was stopped does not get there
        while True:
            replicas = client.command("STATUS")["replicas"]
            if replicas[1]["pending"] == 16 and not replicas[0]["pending"]:
                break
        kill(service, "replica1_rank0")
        unpause.join(TIMEOUT_S)
        done = [future.result(TIMEOUT_S) for future in futures]
        assert sum(completion.retried for completion in done) == 16
        assert {completion.replica for completion in done} == {0}
        for request, completion in zip(REQUESTS, done, strict=True):
            assert bits(completion) == bits_of(expected, request.id)
        futures = submit_all(client)
        kill(service, "replica0_rank0")
        errors = [future.exception(TIMEOUT_S) for future in futures]
        assert {type(error) for error in errors if error} <= {ReplicaLost}
        with pytest.raises(ReplicaLost, match="no replica is left: replica1_rank0"):
            client.generate(REQUESTS[0])


def test_no_coordinator(model: FrozenModel, tmp_path: Path) -> None:
    with (
        small_service(model, "tp2,dp2", tmp_path / "run") as service,
        Client(service.address, TIMEOUT_S) as client,
    ):
        futures = submit_all(client)
        kill(service, "coordinator")
        errors = [future.exception(TIMEOUT_S) for future in futures]
        assert {type(error) for error in errors if error} <= {CoordinatorLost}
        with pytest.raises(CoordinatorLost):
            client.generate(REQUESTS[0])
        assert service.wait(TIMEOUT_S)  # nobody has to stop it
    assert "coordinator" in service.failures[0]
    assert "SIGKILL" in service.failures[0]
