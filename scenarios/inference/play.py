"""Plays an inference scenario: a service of the case's layout answers its requests.

First all at once, in some rounds; then in the other order, with a pause, a suspension and a
resumption while tokens are generated. All must give the same.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from scenarios.data.tokenizer import load_tokenizer
from scenarios.failures import RunFailed
from scenarios.golden import Metrics
from scenarios.inference.client import Client, Completion, OnTokens
from scenarios.inference.errors import InferenceError, Refused
from scenarios.inference.model_files import initial_weights, read_model, write_model
from scenarios.inference.request import Request
from scenarios.inference.service import Service, ServiceConfig
from scenarios.inference.throughput import ROUNDS
from scenarios.inference.workload import (
    check_completions,
    check_replicas,
    check_same,
    describe_speed,
    make_requests,
    metrics_of_completions,
)
from scenarios.progress import show_count
from scenarios.scenario import Scenario
from scenarios.verdict import Check

FRACTION = 4
"""The second run is suspended when a quarter of its tokens are there."""


class ServiceFailed(RunFailed):
    """The service lost a process or did not answer."""

    def __init__(self, reason: str, log_dir: Path):
        super().__init__([], last_step=None, log_dir=log_dir, reason=reason)

    def _message(self) -> str:
        return f"{self.reason}; logs: {self.log_dir}"


@dataclass(frozen=True)
class PlayedInference:
    """What the two runs gave."""

    metrics: Metrics
    """Of the first."""
    checks: tuple[Check, ...]
    runs: tuple[tuple[str, float], ...]
    rounds_tokens_s: tuple[float, ...]
    """Throughput of the first run and its repetitions."""


def play_inference(
    scenario: Scenario, out_dir: Path, progress: TextIO, timeout_s: float
) -> PlayedInference:
    """Starts the service, asks it, and checks what must hold without a golden.

    Args:
        scenario: with ``inference``.
        out_dir: an empty folder.
        progress: where to say what is done.
        timeout_s: deadline of every request.

    Raises:
        ValueError: a frozen model that is not the case's.
        RunFailed: a process was lost, or a request was not answered in time.
    """
    config = scenario.inference
    assert config is not None
    start = "start"
    folder = config.model_folder
    if folder is None:
        start = "start with initial weights: no frozen model of this size is shipped"
        folder, seed = out_dir / "model", scenario.training.seed
        weights = initial_weights(scenario.model, seed)
        origin = {"seed": seed}
        write_model(folder, scenario.model, weights, tokenizer=None, eod=None, provenance=origin)
        del weights
    model = read_model(folder)
    if model.config != scenario.model:
        raise ValueError(f"{model.folder}: got {model.config}, expected {scenario.model}")
    tokenizer = load_tokenizer(str(model.tokenizer or "bytes"))
    num_positions = model.config.max_position_embeddings
    requests = make_requests(config, tokenizer, num_positions, scenario.training.seed)
    run_dir = out_dir / "run1"
    run_dir.mkdir()
    service_config = ServiceConfig(model.folder, model.config, scenario.layout, config.engine)
    progress.write(f"{scenario.layout.world_size} ranks and a coordinator are starting\n")
    progress.flush()
    runs = []
    start_s = time.monotonic()
    with Service(service_config, run_dir) as service:
        try:
            with Client(service.address) as client:
                service.wait_for_replicas(client)
                runs.append((start, time.monotonic() - start_s))
                with _shown(f"round 1 of {ROUNDS}", requests, progress) as on_tokens:
                    first, wall_s = _run(client, requests, timeout_s, on_tokens)
                runs.append((f"round 1: {describe_speed(first, wall_s)}", wall_s))
                start_s = time.monotonic()
                again = []
                for number in range(2, ROUNDS + 1):
                    with _shown(f"round {number} of {ROUNDS}", requests, progress) as on_tokens:
                        again.append(_run(client, requests, timeout_s, on_tokens))
                runs.append((f"rounds 2 to {ROUNDS}", time.monotonic() - start_s))
                start_s = time.monotonic()
                label = "other order, suspended"
                with _shown(label, requests, progress) as on_tokens:
                    second = _suspended_run(client, requests[::-1], timeout_s, on_tokens)[::-1]
                runs.append((label, time.monotonic() - start_s))
                status = client.command("STATUS")
        except InferenceError as error:
            reason = "; ".join([*service.failures, f"{type(error).__name__}: {error}"])
            raise ServiceFailed(reason, run_dir / "logs") from None
    if service.failures:
        raise ServiceFailed("; ".join(service.failures), run_dir / "logs")
    metrics = metrics_of_completions(first, tokenizer)
    checks = [check_completions(requests, first)]
    if scenario.layout.dp > 1:
        checks.append(check_replicas(first, scenario.layout.dp))
    others = {f"round {number}": done for number, (done, _) in enumerate(again, 2)}
    for name, done in (others | {"other order, suspended": second}).items():
        checks.append(check_same(name, metrics, metrics_of_completions(done, tokenizer)))
    in_use = [replica["blocks_in_use"] for replica in status["replicas"]]
    detail = f"{' + '.join(map(str, in_use))} in use at the end"
    checks.append(Check("KV blocks returned", not any(in_use), detail))
    num_tokens = sum(len(done.tokens) for done in first)
    rounds = tuple(num_tokens / round_s for round_s in (wall_s, *(s for _, s in again)))
    return PlayedInference(metrics, tuple(checks), tuple(runs), rounds)


@contextmanager
def _shown(label: str, requests: list[Request], progress: TextIO) -> Iterator[OnTokens]:
    """Says what begins; the callback counts the tokens that came."""
    num_tokens = sum(request.sampling.max_new_tokens for request in requests)
    progress.write(f"{label}: {len(requests)} requests, {num_tokens} tokens\n")
    progress.flush()
    num_done = 0
    with show_count(progress, "tokens") as on_count:

        def count(tokens: list[int]) -> None:  # on the client's one thread
            nonlocal num_done
            num_done += len(tokens)
            on_count(num_done, num_tokens)

        yield count


def _run(
    client: Client, requests: list[Request], timeout_s: float, on_tokens: OnTokens
) -> tuple[list[Completion], float]:
    """All requests at once: their completions, and the wall time."""
    # So that they are shared out evenly, however long it takes to send them.
    client.command("PAUSE", timeout_s)
    start_s = time.monotonic()
    futures = [
        client.submit(request, timeout_s=timeout_s, on_tokens=on_tokens) for request in requests
    ]
    client.command("UNPAUSE", timeout_s)
    return _results(futures), time.monotonic() - start_s


def _results(futures: "list[Future[Completion]]") -> list[Completion]:
    return [future.result() for future in futures]


def _suspended_run(
    client: Client, requests: list[Request], timeout_s: float, on_tokens: OnTokens
) -> list[Completion]:
    num_wanted = sum(r.sampling.max_new_tokens for r in requests) // FRACTION
    num_tokens = 0
    enough = threading.Event()

    def count(tokens: list[int]) -> None:  # on the client's one thread
        nonlocal num_tokens
        num_tokens += len(tokens)
        on_tokens(tokens)
        if num_tokens >= num_wanted:
            enough.set()

    futures = [client.submit(r, timeout_s=timeout_s, on_tokens=count) for r in requests]
    for future in futures:
        future.add_done_callback(lambda f: enough.set() if f.exception() else None)
    enough.wait()
    for command in ("PAUSE", "SUSPEND", "RESUME", "UNPAUSE"):
        state = client.command(command, timeout_s)
        busy = [r for r in state["replicas"] if r.get("blocks_in_use")]
        if command == "SUSPEND" and busy:
            raise Refused(f"SUSPEND: replica {busy[0]['replica']} still owns KV blocks")
    return _results(futures)
