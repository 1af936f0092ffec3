"""Ranks for tests: threads of this process (fast), or processes of their own (real faults)."""

import atexit
import functools
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from primitives.env import STAGING
from scenarios.fork_server import ForkServer, Process

ROOT = Path(__file__).resolve().parent.parent
WORKER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.ranks import work
work(*sys.argv[1:])
"""


@contextmanager
def small_tmpfs(folder: Path, size: str) -> Iterator[str]:
    """A memory file system of ``size`` (as mount takes it) on ``folder``."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    if os.system(f"mount -t tmpfs -o size={size} tmpfs {folder} 2>/dev/null") != 0:
        pytest.skip("this container may not mount a tmpfs")
    try:
        yield str(folder)
    finally:
        os.system(f"umount -l {folder}")


class ThreadRanks:
    """Backends of one group, each used by a thread of its own.

    Args:
        hosts: the host of each rank, a letter each, like "aabb"; empty: all on one.
        staging: PRIMITIVES_STAGING of the ranks; empty: as it is here.
    """

    def __init__(
        self,
        world_size: int,
        timeout_s: float = 20.0,
        hosts: str = "",
        staging: str = "",
        **options: Any,
    ) -> None:
        from primitives import _C
        from primitives.hosts import connect_hosts

        store = dist.HashStore()

        def make(rank: int) -> Any:
            settings = _C.Backend.Options(timedelta(seconds=timeout_s))
            for name, value in options.items():
                setattr(settings, name, value)
            if len(set(hosts)) < 2:
                return _C.Backend(store, rank, world_size, settings)
            wire = connect_hosts(store, rank, world_size, timeout_s)
            return _C.Backend(store, rank, world_size, settings, list(hosts), wire)

        self.world_size, self.num_hosts = world_size, max(1, len(set(hosts)))
        with pytest.MonkeyPatch.context() as patch:
            if staging:
                patch.setenv(STAGING.name, staging)
            self.backends = run_threads(world_size, make)

    def __call__(self, function: Callable[[Any, int], Any]) -> list[Any]:
        """``function(backend, rank)`` on every rank at once; the results in rank order."""
        return run_threads(self.world_size, lambda r: function(self.backends[r], r))

    def errors(self, function: Callable[[Any, int], Any]) -> list[BaseException | None]:
        """What each rank raised."""

        def call(rank: int) -> BaseException | None:
            try:
                function(self.backends[rank], rank)
            except Exception as error:
                return error
            return None

        return run_threads(self.world_size, call)

    def close(self) -> None:
        run_threads(self.world_size, lambda r: self.backends[r].shutdown())
        self.backends = []


def run_threads(num: int, function: Callable[[int], Any], timeout_s: float = 60.0) -> list[Any]:
    """``function(i)`` on ``num`` threads; raises the first error."""
    results: list[Any] = [None] * num
    errors: list[BaseException] = []

    def call(i: int) -> None:
        try:
            results[i] = function(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results


@functools.cache
def fork_server() -> ForkServer:
    """One for all tests of this process."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def work(folder: str, target: str, *args: str) -> None:
    """A process of ProcessRanks: ``module:function`` of the tests, with ``folder`` as its own."""
    os.chdir(folder)
    sys.path[:0] = [str(ROOT / "tests")]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(*args)


@dataclass
class ProcessRanks:
    """``module:function`` on ``world_size`` processes that meet through a file in ``folder``.

    ``fresh``: each is an interpreter of its own instead of a fork, for what is settled when a
    process starts, like malloc's settings.
    """

    target: str
    world_size: int
    folder: Path
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    fresh: bool = False
    processes: list[Process | subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> "ProcessRanks":
        for rank in range(self.world_size):
            env = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TEST_RANK": str(rank),
                "TEST_WORLD_SIZE": str(self.world_size),
                "TEST_STORE": str(self.folder / "store"),
                **self.env,
            }
            words = [str(self.folder), self.target, *self.args]
            log = self._log(rank)
            if self.fresh:
                with log.open("x") as output:
                    process: Process | subprocess.Popen[bytes] = subprocess.Popen(
                        [sys.executable, "-c", WORKER, *words],
                        env=env,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
            else:
                process = fork_server().start("tests.ranks:work", *words, environment=env, log=log)
            self.processes.append(process)
        return self

    def wait(self, timeout_s: float = 60.0) -> list[tuple[int, str]]:
        """Exit code and output of each rank; kills what does not end."""
        try:
            return [self.wait_for(rank, timeout_s) for rank in range(self.world_size)]
        finally:
            for rank in range(self.world_size):
                self.kill(rank)

    def wait_for(self, rank: int, timeout_s: float = 60.0) -> tuple[int, str]:
        """Exit code and output of one rank."""
        deadline = time.monotonic() + timeout_s
        log = self._log(rank)
        while (code := self.processes[rank].poll()) is None:
            assert time.monotonic() < deadline, f"rank {rank} does not end:\n{log.read_text()}"
            time.sleep(0.01)
        return code, log.read_text()

    def kill(self, rank: int) -> None:
        """Ends a rank, if it still runs."""
        self.processes[rank].send_signal(signal.SIGKILL)
        self.processes[rank].wait()

    def leftovers(self) -> list[str]:
        """Shared memory that these processes left behind."""
        return [name for process in self.processes for name in leftovers(process.pid)]

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"


def init(timeout_s: float = 20.0) -> tuple[int, int]:
    """In a process of ProcessRanks: init_process_group; rank and world size."""
    import primitives.backend

    primitives.backend.register()
    rank, world_size = int(os.environ["TEST_RANK"]), int(os.environ["TEST_WORLD_SIZE"])
    store = dist.FileStore(os.environ["TEST_STORE"], world_size)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "primitives", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    return rank, world_size


def rank_processes(run_dir: Path) -> dict[int, int]:
    """Rank -> pid of the living processes that write the logs of a run of ``scenarios.launch``."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            log = (process / "fd" / "1").readlink()
            state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if log.parent == run_dir / "logs" and state != "Z":
            found[int(log.stem.removeprefix("rank_"))] = int(process.name)
    return found


def leftovers(pid: int | None = None) -> list[str]:
    """Shared memory that process ``pid`` (default: this one) left behind."""
    pattern = f"primitives-{os.getuid()}-{pid or os.getpid()}-*"
    return [path.name for path in Path("/dev/shm").glob(pattern)]


FETCH = """
import ctypes, os, sys
process = os.pidfd_open(int(sys.argv[1]))
sys.exit(ctypes.CDLL(None).syscall(438, process, 0, 0) < 0)  # pidfd_getfd
"""


def fetches_descriptors() -> bool:
    """Whether this system lets a process fetch descriptors of another (PRIMITIVES_CUDA_MEMORY)."""
    return subprocess.run([sys.executable, "-c", FETCH, str(os.getpid())]).returncode == 0
