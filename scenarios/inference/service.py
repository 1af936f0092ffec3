"""Starts the processes of a service, watches them, and ends what is left of it.

Every replica is a job of its own, so the loss of one does not touch another. A replica of which a
rank has died is ended, and the coordinator is told; without the coordinator all are ended.
"""

import json
import os
import secrets
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from primitives.env import FLIGHT_DIR
from primitives.layout import NUM_PARTS
from scenarios.failures import signal_name
from scenarios.fork_server import ForkServer, Process
from scenarios.inference.client import Client
from scenarios.inference.errors import InferenceError, ReplicaLost
from scenarios.inference.link import Link
from scenarios.inference.model_files import TOKENIZER
from scenarios.inference_config import EngineConfig
from scenarios.launch import sweep_shared_memory
from scenarios.layout import Layout
from scenarios.scenario import ModelConfig

POLL_S = 0.05
START_S = 120.0
STOP_S = 20.0
LOOPBACK = "tcp://127.0.0.1:*"


@dataclass(frozen=True)
class ServiceConfig:
    """What a service is made of."""

    model_folder: Path
    model: ModelConfig
    layout: Layout
    """Its dp is the number of replicas."""
    engine: EngineConfig
    bind: str = LOOPBACK
    """Of the coordinator's socket; anybody who reaches it can use and stop the service."""


class Service:
    """A running service: a coordinator, and tp * pp processes for each of dp replicas.

    Args:
        config: what to start.
        run_dir: an empty folder, for jobs and logs.

    Raises:
        ValueError: the layout does not fit the model, or the address cannot be bound.
        RuntimeError: the coordinator did not start.

    Contract: use as a context manager, or call ``close``.
    """

    def __init__(self, config: ServiceConfig, run_dir: Path):
        self.config, self._dir = config, run_dir
        self._layout = _replica_layout(config)
        config.engine.num_blocks(config.model)
        self._secret = secrets.token_hex(16)
        self.failures: list[str] = []
        """What went wrong, in the order in which it was seen."""
        self._ending = threading.Event()
        self._ready = threading.Event()
        self.processes: dict[str, int] = {}
        """Names of the processes, as of their logs, and their ids."""
        self._thread = threading.Thread(target=self._run, name="inference-service", daemon=True)
        self._thread.start()
        self._ready.wait()
        address = run_dir / "address"
        if not address.exists():
            self.close()
            raise ValueError(self.failures[0] if self.failures else "the service did not start")
        self.address = address.read_text(encoding="utf-8")
        """Of the coordinator."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until all processes have ended; False if the time was over before."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def wait_for_replicas(self, client: Client, timeout_s: float = START_S) -> None:
        """Until every replica has registered; requests may be sent before.

        Raises:
            InferenceError: one was lost, or the time was over.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            replicas = client.command("STATUS")["replicas"]
            lost = [replica["lost"] for replica in replicas if "lost" in replica]
            if lost or time.monotonic() > deadline_s:
                raise ReplicaLost("; ".join(lost) or f"no replica within {timeout_s:g} s")
            if len(replicas) == self.config.layout.dp:
                return
            time.sleep(POLL_S)

    def close(self) -> None:
        """Stops the service, and kills what does not end by itself."""
        if self._thread.is_alive() and hasattr(self, "address"):
            try:
                with Client(self.address, timeout_s=STOP_S) as client:
                    client.command("STOP", timeout_s=STOP_S)
                self.wait(STOP_S)
            except InferenceError:
                pass  # stopped already, or broken: what is left is ended below
        self._ending.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- on the thread of the service ------------------------------------------------------------

    def _run(self) -> None:
        try:
            with ForkServer() as server:
                self._watch(server)
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")
        finally:
            self._ready.set()
            if self.failures:
                sweep_shared_memory()

    def _watch(self, server: ForkServer) -> None:
        job = self._write_job()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment[FLIGHT_DIR.name] = FLIGHT_DIR.get() or str(self._dir / "flight")

        def start(name: str, function: str, *args: str) -> Process:
            log = self._dir / "logs" / f"{name}.log"
            process = server.start(function, str(job), *args, environment=environment, log=log)
            self.processes[name] = process.pid
            return process

        coordinator = start("coordinator", "scenarios.inference.coordinator_process:main")
        address = self._dir / "address"
        deadline_s = time.monotonic() + START_S
        while not address.exists():
            if coordinator.poll() is not None or time.monotonic() > deadline_s:
                self.failures.append(self._ended("coordinator", coordinator))
                return
            time.sleep(POLL_S)
        replicas = [
            {
                f"replica{index}_rank{rank}": start(
                    f"replica{index}_rank{rank}",
                    "scenarios.inference.replica:main",
                    str(index),
                    str(rank),
                )
                for rank in range(self._layout.world_size)
            }
            for index in range(self.config.layout.dp)
        ]
        self._ready.set()
        link = Link(address.read_text(encoding="utf-8"))
        lost: set[int] = set()
        while not self._ending.is_set():
            if coordinator.poll() is not None:
                if coordinator.returncode != 0:
                    self.failures.append(self._ended("coordinator", coordinator))
                break
            for index, ranks in enumerate(replicas):
                if index not in lost and any(rank.poll() for rank in ranks.values()):
                    lost.add(index)
                    # A signal is the cause, an error of the others may be the consequence; yet it
                    # may be told a moment later.
                    time.sleep(POLL_S)
                    failed = {name: rank for name, rank in ranks.items() if rank.poll()}
                    name = min(failed, key=lambda name: failed[name].returncode or 0)
                    message = self._ended(name, failed[name])
                    self.failures.append(message)
                    link.send("LOST", secret=self._secret, replica=index, message=message)
                    for rank in ranks.values():
                        rank.send_signal(signal.SIGKILL)
            time.sleep(POLL_S)
        link.gone = coordinator.returncode is not None
        link.close()
        # Replicas end by themselves after STOP; whatever still runs ends with the fork server.
        deadline_s = time.monotonic() + (0.0 if self._ending.is_set() else STOP_S)
        every = [rank for ranks in replicas for rank in ranks.values()]
        while any(rank.poll() is None for rank in every) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)

    def _write_job(self) -> Path:
        (self._dir / "logs").mkdir()
        (self._dir / "stores").mkdir()
        job = {
            "bind": self.config.bind,
            "address": str(self._dir / "address"),
            "stores": str(self._dir / "stores"),
            "secret": self._secret,
            "model_folder": str(self.config.model_folder),
            "model": self.config.model.model_dump(mode="json"),
            "layout": self._layout.model_dump(mode="json"),
            "has_tokenizer": (self.config.model_folder / TOKENIZER).is_file(),
            "num_replicas": self.config.layout.dp,
            "config": self.config.engine.model_dump(mode="json"),
        }
        path = self._dir / "service.json"
        path.touch(mode=0o600)  # it holds the secret
        path.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
        return path

    def _ended(self, name: str, process: Process) -> str:
        code = process.returncode
        if code is not None and code < 0:
            return f"{name} (pid {process.pid}) was killed by {signal_name(-code)}"
        log = (self._dir / "logs" / f"{name}.log").read_text(errors="replace").strip()
        last = log.splitlines()[-1] if log else "its log is empty"
        how = "does not answer" if code is None else f"ended with status {code}"
        return f"{name} {how}: {last}"


def _replica_layout(config: ServiceConfig) -> Layout:
    layout, model = config.layout, config.model
    if layout.ep > 1 or layout.etp > 1 or layout.zero1 is not None:
        raise ValueError(f"inference: got layout {layout}, expected tp, pp, dp and sp only")
    if NUM_PARTS % layout.tp or model.num_layers % layout.pp:
        raise ValueError(
            f"inference: got layout {layout}, expected tp 1, 2, 4 or 8 and pp to divide the "
            f"{model.num_layers} layers"
        )
    return Layout.build(tp=layout.tp, pp=layout.pp, sp=layout.sp)
