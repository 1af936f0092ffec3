"""The coordinator's process: one ROUTER socket and the loop around it."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import zmq

from scenarios.golden import write_atomically
from scenarios.inference.coordinator import Coordinator
from scenarios.inference.messages import MAX_NBYTES
from scenarios.inference_config import EngineConfig
from scenarios.scenario import ModelConfig

POLL_MS = 200
PING_S = 0.2
AT_ONCE = 1000
"""Messages that are read before requests are given out and clients are looked after."""


def main(path: str) -> None:
    """The coordinator's process.

    Args:
        path: of a JSON file with ``bind``, ``model``, ``config``, ``has_tokenizer``,
            ``num_replicas``, ``secret`` and ``address``, the file in which the address is told.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_NBYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 1000)
    try:
        socket.bind(job["bind"])
    except zmq.ZMQError as error:
        sys.exit(f"{job['bind']} cannot be bound: {error}")
    write_atomically(Path(job["address"]), socket.getsockopt_string(zmq.LAST_ENDPOINT))
    coordinator = Coordinator(
        socket,
        ModelConfig.build(**job["model"]),
        EngineConfig.build(**job["config"]),
        job["has_tokenizer"],
        job["num_replicas"],
        job["secret"],
    )
    _serve(coordinator, socket)
    socket.close()
    context.term()
    os._exit(0)


def _serve(coordinator: Coordinator, socket: "zmq.Socket[bytes]") -> None:
    """Until all replicas have ended after STOP."""
    pinged_s = time.monotonic()
    while not coordinator.ended:
        if socket.poll(POLL_MS):
            for _ in range(AT_ONCE):
                try:
                    identity, *frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                coordinator.receive(identity, frames)
        coordinator.dispatch()
        if time.monotonic() - pinged_s > PING_S:
            pinged_s = time.monotonic()
            coordinator.watch()
    coordinator.say_goodbye()
