"""Who am I and where do the ranks of my job meet, under whatever launcher started this process.

torchrun tells every rank an address. mpirun and srun do not: there rank 0 opens a TCPStore on a
free port and writes it into a file that only this job and this user know; the file names the
process that wrote it, so one left by a killed job is never taken for an answer.
"""

import hashlib
import importlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # see [Note: autoload] in backend.py
    from torch._C._distributed_c10d import Store, TCPStore


class RankInfo(NamedTuple):
    """This process within its job.

    ``job`` is equal on all ranks of one job on one host and different for concurrent jobs.
    """

    rank: int
    world_size: int
    local_rank: int
    job: str


# (rank, world size, local rank, job id candidates); the first complete row wins.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("TORCHELASTIC_RUN_ID", "MASTER_PORT")),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    "MPICH / Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("PMI_PORT",)),
    "srun": (
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
}


def rank_info() -> RankInfo | None:
    """Rank, world size and job from torchrun, mpirun or srun variables; None when there are none.

    Raises:
        ValueError: a launcher's variables are not integers or contradict each other.
    """
    for launcher, (rank_name, world_name, local_name, job_names) in LAUNCHERS.items():
        if rank_name not in os.environ or world_name not in os.environ:
            continue
        try:
            rank, world_size = int(os.environ[rank_name]), int(os.environ[world_name])
            local_rank = int(os.environ.get(local_name, rank))
        except ValueError as error:
            raise ValueError(f"{launcher} variables {rank_name}, {world_name}: {error}") from None
        if not 0 <= rank < world_size:
            raise ValueError(f"{launcher}: {rank_name}={rank} is outside {world_name}={world_size}")
        job = "/".join(os.environ[name] for name in job_names if name in os.environ)
        return RankInfo(rank, world_size, local_rank, f"{launcher}/{job or os.getppid()}")
    return None


_meetings = itertools.count()  # every rank of a job meets equally often


def install() -> None:
    """Let ``env://``, torch's default, also work under mpirun and srun."""
    module = importlib.import_module("torch.distributed.rendezvous")  # a function has its name too
    handlers: dict[str, Callable[..., Any]] = module._rendezvous_handlers
    of_torch = handlers["env"]
    if getattr(of_torch, "__module__", "") == __name__:
        return

    def env_rendezvous(
        url: str, timeout: timedelta = timedelta(minutes=30), **options: Any
    ) -> Iterator[tuple["Store", int, int]]:
        """torch's own meeting when it can work, else ours."""
        info = rank_info()
        told = "RANK" in os.environ or "rank=" in url
        if told or info is None:
            yield from of_torch(url, timeout=timeout, **options)
        else:
            yield meet(info, timeout), info.rank, info.world_size
            raise RuntimeError("env:// under mpirun or srun cannot meet a second time")

    handlers["env"] = env_rendezvous


def meet(info: RankInfo, timeout: timedelta) -> "Store":
    """The store that all ranks of this job share, on this host.

    Args:
        info: this process within its job.
        timeout: how long to wait for the other ranks.

    Returns:
        A TCPStore that rank 0 serves; at MASTER_ADDR:MASTER_PORT when both are set.

    Raises:
        TimeoutError: rank 0 of the job did not come on this host.
    """
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return _tcp_store(host, port, info, timeout)
    file = MeetingFile(_meeting_path(info))
    if info.rank == 0:
        store = _tcp_store("127.0.0.1", 0, info, timeout, wait_for_workers=False)
        with file.announced(store.port):
            _wait_for_all(store, info, timeout)
        return store
    port = file.wait(info.rank, info.world_size, timeout.total_seconds())
    store = _tcp_store("127.0.0.1", port, info, timeout, wait_for_workers=False)
    store.add("met", 1)
    return store


def _tcp_store(
    host: str, port: int, info: RankInfo, timeout: timedelta, *, wait_for_workers: bool = True
) -> "TCPStore":
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(host, port, info.world_size, info.rank == 0, timeout, wait_for_workers)


def _meeting_path(info: RankInfo) -> Path:
    name = hashlib.sha256(f"{info.job}/{next(_meetings)}".encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"primitives-{os.getuid()}-{name}.json"


class MeetingFile:
    """Where rank 0 tells the other ranks of its host the port of its store.

    The file names the process that wrote it: what a killed job left is replaced, never believed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def announced(self, port: int) -> Iterator[None]:
        """In rank 0: the file is there inside the ``with``.

        Raises:
            ValueError: another living process has announced itself at this path.
        """
        there = self._read()
        if there and there["pid"] != os.getpid() and _is_alive(there):
            raise ValueError(f"{self.path} is the meeting of process {there['pid']}, which lives")
        pid = os.getpid()
        meeting = {"port": port, "pid": pid, "start": _start_time(pid)}
        staged = self.path.with_suffix(f".{pid}")
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(meeting, file)
        staged.replace(self.path)
        try:
            yield
        finally:
            if self._read() == meeting:
                self.path.unlink(missing_ok=True)

    def wait(self, rank: int, world_size: int, timeout_s: float) -> int:
        """In the other ranks: the port.

        Raises:
            TimeoutError: rank 0 did not come; the message tells of a file left by another.
        """
        deadline = time.monotonic() + timeout_s
        while not ((meeting := self._read()) and _is_alive(meeting)):
            if time.monotonic() > deadline:
                stale = (
                    f"; the file there is left over from process {meeting['pid']}, which has ended"
                    if meeting
                    else ""
                )
                raise TimeoutError(
                    f"rank {rank} of {world_size}: rank 0 did not come to {self.path} within "
                    f"{timeout_s:g} s (all ranks must run on one host, or set MASTER_ADDR and "
                    f"MASTER_PORT){stale}"
                )
            time.sleep(0.01)
        return int(meeting["port"])

    def _read(self) -> dict[str, Any]:
        """What the file says; empty when it is not there, not ours, or not a meeting."""
        try:
            ours = self.path.stat().st_uid == os.getuid()
            meeting = json.loads(self.path.read_text()) if ours else {}
        except (FileNotFoundError, ValueError):
            return {}
        complete = isinstance(meeting, dict) and {"port", "pid", "start"} <= meeting.keys()
        return meeting if complete else {}


def _is_alive(meeting: dict[str, Any]) -> bool:
    return bool(_start_time(meeting["pid"]) == meeting["start"])


def _wait_for_all(store: "Store", info: RankInfo, timeout: timedelta) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    while (num_met := store.add("met", 0)) < info.world_size - 1:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank 0 of {info.world_size}: only {num_met} of the other "
                f"{info.world_size - 1} ranks came within {timeout.total_seconds():g} s"
            )
        time.sleep(0.005)


def _start_time(pid: int) -> int | None:
    """Clock ticks since boot at which a process started; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])
