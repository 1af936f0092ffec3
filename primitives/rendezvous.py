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
    path = _meeting_file(info)
    if info.rank == 0:
        store = _tcp_store("127.0.0.1", 0, info, timeout, wait_for_workers=False)
        _write(path, {"port": store.port, "pid": os.getpid(), "start": _start_time(os.getpid())})
        try:
            _wait_for_all(store, info, timeout)
        finally:
            path.unlink(missing_ok=True)
        return store
    port = _read_port(path, info, timeout)
    store = _tcp_store("127.0.0.1", port, info, timeout, wait_for_workers=False)
    store.add("met", 1)
    return store


def _tcp_store(
    host: str, port: int, info: RankInfo, timeout: timedelta, *, wait_for_workers: bool = True
) -> "TCPStore":
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(host, port, info.world_size, info.rank == 0, timeout, wait_for_workers)


def _meeting_file(info: RankInfo) -> Path:
    name = hashlib.sha256(f"{info.job}/{next(_meetings)}".encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"primitives-{os.getuid()}-{name}.json"


def _write(path: Path, meeting: dict[str, Any]) -> None:
    staged = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(meeting, file)
    staged.replace(path)


def _read_port(path: Path, info: RankInfo, timeout: timedelta) -> int:
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        try:
            ours = path.stat().st_uid == os.getuid()
            meeting = json.loads(path.read_text()) if ours else {}
        except (FileNotFoundError, json.JSONDecodeError):
            meeting = {}
        if meeting and _start_time(meeting["pid"]) == meeting["start"]:
            return int(meeting["port"])
        time.sleep(0.01)
    raise TimeoutError(
        f"rank {info.rank} of {info.world_size}: rank 0 did not come to {path} within "
        f"{timeout.total_seconds():g} s (all ranks must run on one host, or set MASTER_ADDR and "
        "MASTER_PORT)"
    )


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
