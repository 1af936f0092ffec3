"""Services of the small model for tests, and what must be left of them: nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zmq

from scenarios.inference.client import Client, Completion
from scenarios.inference.messages import decode, encode
from scenarios.inference.model_files import FrozenModel
from scenarios.inference.service import Service, ServiceConfig
from scenarios.layout import Layout
from tests.inference_cases import SMALL, Results
from tests.ranks import leftovers

TIMEOUT_S = 120.0
"""Long: it only ends what would hang."""


@contextmanager
def small_service(model: FrozenModel, layout: str, folder: Path) -> Iterator[Service]:
    """A running service; afterwards none of its processes and no shared memory is left."""
    folder.mkdir()
    config = ServiceConfig(model.folder, model.config, Layout.parse(layout), SMALL)
    service = Service(config, folder)
    try:
        with Client(service.address, TIMEOUT_S) as client:
            service.wait_for_replicas(client, TIMEOUT_S)
        yield service
    finally:
        service.close()
    for name, pid in service.processes.items():
        assert not is_alive(pid), name
        assert leftovers(pid) == [], name


def is_alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def bits(done: Completion) -> dict[str, Any]:
    """What must not depend on anything."""
    return {
        "tokens": done.tokens,
        "log_probs": [value.hex() for value in done.log_probs],
        "prompts": [value.hex() for value in done.prompt_log_probs],
        "digests": done.digests,
        "reasons": done.reason,
    }


def bits_of(results: Results, request_id: str) -> dict[str, Any]:
    """The same of an engine's results."""
    return {name: by_request[request_id] for name, by_request in results.as_json().items()}


class Raw:
    """A socket without manners."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def ask(self, *frames: bytes) -> tuple[str, dict[str, Any]]:
        """Sends frames and waits for an answer."""
        self.socket.send_multipart(frames)
        assert self.socket.poll(int(TIMEOUT_S * 1000))
        return decode(self.socket.recv_multipart())

    def say(self, kind: str, /, **fields: Any) -> tuple[str, dict[str, Any]]:
        """A message of the table."""
        return self.ask(*encode(kind, **fields))

    def close(self) -> None:
        """Vanishes without a word."""
        self.socket.close()
        self._context.term()
