"""Starts the ranks of one run on this host, watches them, and collects how they ended.

The launcher holds the rendezvous store, so the loss of any rank leaves it standing. After the first
failure the other ranks get ``GRACE_S`` to report what they saw, then they are killed.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from primitives.env import FLIGHT_DIR, SHM_DIR
from scenarios.failures import RankFailure, RunFailed, signal_name
from scenarios.fork_server import ForkServer
from scenarios.golden import Value
from scenarios.metrics_file import MetricsTail
from scenarios.worker import Job, failure_path

GRACE_S = 8.0
"""All ranks are down within 10 s of the first failure."""
POLL_S = 0.05
STARTUP_S = 60.0
"""Added to the hang limit until the first step: imports, rendezvous, loading a checkpoint."""
OnStep = Callable[[int, dict[str, Value]], None]


def launch(
    job: Job,
    *,
    world_size: int,
    master_port: int = 0,
    timeout_s: float = 300.0,
    on_step: OnStep = lambda step, metrics: None,
    server: ForkServer | None = None,
) -> None:
    """Runs a job on ``world_size`` new processes and returns when all have ended well.

    Args:
        job: what the ranks are told; its ``run_dir`` must exist.
        world_size: how many ranks.
        master_port: port of the rendezvous store on 127.0.0.1; 0 takes a free one.
        timeout_s: hang limit: the longest time between steps; ``STARTUP_S`` more for the first.
        on_step: called with each step that rank 0 logs.
        server: starts the ranks; several runs may share one. None: one for this run.

    Raises:
        ValueError: the port is taken.
        RunFailed: a rank failed, the run hung, or SIGINT or SIGTERM arrived.
    """
    listener = _listen(master_port)
    ranks: list[_Rank] = []
    starting = nullcontext(server) if server else ForkServer()
    with listener, starting as starter, signals() as received:
        port = listener.getsockname()[1]
        path = job.write()
        (Path(job.run_dir) / "logs").mkdir()
        run_id = uuid.uuid4().hex
        try:
            for rank in range(world_size):
                ranks.append(_Rank(starter, job, path, rank, world_size, port, run_id))
            store = _hold_store(listener)
            _watch(job, ranks, timeout_s, on_step, received)
            del store
        finally:
            for rank_process in ranks:
                rank_process.kill()
            if any(rank_process.process.returncode for rank_process in ranks):
                sweep_shared_memory()


class _Rank:
    """One rank's process, its log and how it ended."""

    def __init__(
        self,
        server: ForkServer,
        job: Job,
        path: Path,
        rank: int,
        world_size: int,
        port: int,
        run_id: str,
    ) -> None:
        self.rank = rank
        self.run_dir = Path(job.run_dir)
        self.log = self.run_dir / "logs" / f"rank_{rank}.log"
        self.stopped: tuple[str, str] | None = None  # (type, message) once we end it
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": run_id,
            "OMP_NUM_THREADS": "1",
            FLIGHT_DIR.name: FLIGHT_DIR.get() or str(self.run_dir / "flight"),
        }
        self.process = server.start(
            "scenarios.worker:main", str(path), environment=environment, log=self.log
        )

    def kill(self) -> None:
        """Ends the rank now, if it still runs."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def failure(self, last_step: int | None) -> RankFailure | None:
        """How the rank failed, or None if it still runs or ended well."""
        code = self.process.poll()
        if code is None or code == 0:
            return None
        failed = RankFailure(
            rank=self.rank,
            type="exited",
            message=f"exited with status {code}: {self._last_log_line()}",
            step=last_step,
            signal=signal_name(-code) if code < 0 else None,
            exit_code=code if code > 0 else None,
            log=str(self.log),
        )
        report = self._report()
        changes: dict[str, Any]
        if report is not None:
            changes = {key: report[key] for key in ("type", "message", "time_s")}
        elif self.stopped:
            changes = dict(zip(("type", "message"), self.stopped, strict=True))
        elif code < 0:
            changes = {"type": "lost", "message": f"killed by {failed.signal}"}
        else:
            return failed
        return RankFailure(**{**failed.__dict__, **changes})

    def _report(self) -> dict[str, Any] | None:
        try:
            report: dict[str, Any] = json.loads(failure_path(self.run_dir, self.rank).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return report

    def _last_log_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "its log is empty"


def _watch(
    job: Job, ranks: list[_Rank], timeout_s: float, on_step: OnStep, received: list[int]
) -> None:
    tail = MetricsTail(Path(job.run_dir) / "metrics.jsonl")
    log_dir = Path(job.run_dir) / "logs"
    last_step: int | None = None
    last_progress = time.monotonic()
    while True:
        # Asked before the tail is read, so that the last step of a finished run is not missed.
        running = any(rank.process.poll() is None for rank in ranks)
        for step, metrics in tail.poll():
            last_step, last_progress = step, time.monotonic()
            on_step(step, metrics)
        if received:
            name = signal_name(received[0])
            _stop(ranks, received[0], ("stopped", f"was stopped by {name}"), received)
            raise RunFailed(
                _failures(ranks, last_step),
                last_step=last_step,
                log_dir=log_dir,
                reason=f"interrupted by {name}",
                interrupted=True,
            )
        if any(rank.failure(last_step) for rank in ranks):
            _stop(ranks, None, ("stopped", "did not end within the grace"), received)
            raise RunFailed(_failures(ranks, last_step), last_step=last_step, log_dir=log_dir)
        if not running:
            return
        limit_s = timeout_s if last_step is not None else timeout_s + STARTUP_S
        if time.monotonic() - last_progress > limit_s:
            for rank in ranks:
                rank.process.send_signal(signal.SIGUSR1)  # stacks of all threads into the log
            time.sleep(0.5)
            _stop(ranks, signal.SIGTERM, ("hung", "hung"), received)
            raise RunFailed(
                _failures(ranks, last_step),
                last_step=last_step,
                log_dir=log_dir,
                reason=f"hang: no step for {limit_s:g} s (stacks of all ranks are in the logs)",
            )
        time.sleep(POLL_S)


def _stop(
    ranks: list[_Rank], number: int | None, why: tuple[str, str], received: list[int]
) -> None:
    """Ends all ranks: by the signal if one is given, and after the grace by SIGKILL."""
    num_received = len(received)
    if number is not None:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.stopped = why
            rank.process.send_signal(number)
    deadline = time.monotonic() + GRACE_S
    while any(rank.process.poll() is None for rank in ranks):
        # A second Ctrl-C ends the patience.
        if time.monotonic() > deadline or len(received) > num_received:
            break
        time.sleep(POLL_S)
    for rank in ranks:
        if rank.process.poll() is None:
            rank.stopped = rank.stopped or why
            rank.kill()


def _failures(ranks: list[_Rank], last_step: int | None) -> list[RankFailure]:
    return [failure for rank in ranks if (failure := rank.failure(last_step))]


def check_port(port: int) -> None:
    """Finds a busy port before anything is written for a run that needs it.

    Raises:
        ValueError: the port is taken.
    """
    _listen(port).close()


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port), backlog=1024)
    except OSError as error:
        raise ValueError(f"port {port} on 127.0.0.1 cannot be used: {error.strerror}") from None


def _hold_store(listener: socket.socket) -> object:
    """The rendezvous store on a socket that already listens (ranks may have connected)."""
    # Imported here: the ranks are starting meanwhile, and commands that start none stay quick.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    port = listener.getsockname()[1]
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=os.dup(listener.fileno()),
    )


def sweep_shared_memory() -> None:
    """Removes what ranks that were killed before their peers had come left behind."""
    with suppress(ImportError):  # which the ranks have met, too, and told
        import torch  # noqa: F401  (the extension links against it)

        from primitives import _C

        _C.sweep_segments(SHM_DIR.get())


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them (in the main thread)."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
