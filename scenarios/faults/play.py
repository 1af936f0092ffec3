"""Plays a fault on a job of its own and judges how it ended.

The ranks come from a fork server that has torch loaded. Their shared memory and working folder are
the job's own and must be empty afterwards.
"""

import multiprocessing as mp
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import primitives.backend
from primitives.env import SHM_DIR
from scenarios.failures import signal_name
from scenarios.faults.catalogue import NUM_RANKS, TIMEOUT, Fault

BOUND_S = 10.0
"""From the moment all ranks have begun, every one must have ended."""
STARTUP_S = 60.0
JOIN_S = 30.0
JOB = "FAULT_JOB"  # rank and port, for the processes of one job


@dataclass(frozen=True)
class Ending:
    """How one rank ended: ``error`` names an exception or a signal, ``returned`` or ``hangs``."""

    rank: int
    error: str
    message: str
    duration_s: float
    """Since all had begun."""


@dataclass(frozen=True)
class Result:
    """A fault that was played."""

    id: str
    what: str
    endings: tuple[Ending, ...]
    leftovers: tuple[str, ...]
    complaints: tuple[str, ...]
    """Why it is not as it must be."""
    skipped: str = ""
    """Why it cannot be played on this machine."""

    @property
    def passed(self) -> bool:
        return not self.complaints

    @property
    def duration_s(self) -> float:
        return max((ending.duration_s for ending in self.endings), default=0.0)

    @property
    def verdict(self) -> str:
        return "FAIL" if self.complaints else "not played" if self.skipped else "ok"

    def line(self) -> str:
        """One line for the terminal."""
        why = "; ".join(self.complaints) or self.skipped
        return f"{self.id:12} {self.verdict:10} {self.duration_s:5.1f} s  {why}".rstrip()

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "duration_s": self.duration_s, "verdict": self.verdict}


def why_not(fault: Fault) -> str:
    """Why the fault cannot be played on this machine; "" if it can."""
    if not fault.shm_size:
        return ""
    with tempfile.TemporaryDirectory() as folder, _small_tmpfs(Path(folder), "64k") as mounted:
        return "" if mounted else "needs the right to mount a tmpfs"


def play(fault: Fault) -> Result:
    """Plays a fault and judges it."""
    if skipped := why_not(fault):
        return Result(fault.id, fault.what, (), (), (), skipped)
    with ExitStack() as stack:
        parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))
        if fault.shm_size:
            shm_dir = Path(parent) / "shm"
            shm_dir.mkdir()
            stack.enter_context(_small_tmpfs(shm_dir, fault.shm_size))
        else:
            shm = tempfile.TemporaryDirectory(prefix="faults-", dir=SHM_DIR.get())
            shm_dir = Path(stack.enter_context(shm))
        work_dir = Path(parent) / "work"
        work_dir.mkdir()
        fault.prepare(shm_dir)
        jobs = [_Job(fault, shm_dir, work_dir) for _ in range(fault.num_jobs)]
        try:
            endings = tuple(ending for job in jobs for ending in job.watch())
        finally:
            for job in jobs:
                job.kill()
        left = tuple(str(path) for folder in (shm_dir, work_dir) for path in folder.iterdir())
    return Result(fault.id, fault.what, endings, left, tuple(judge(fault, endings, left)))


def judge(fault: Fault, endings: Sequence[Ending], leftovers: Sequence[str]) -> Iterator[str]:
    """What is not as it must be."""
    allowed = (fault.error,) if isinstance(fault.error, str) else fault.error
    for ending in endings:
        rank, victim = ending.rank, fault.victims.get(ending.rank)
        expected = allowed if victim is None else (victim,)
        if ending.error not in expected and victim != "any":
            yield (
                f"rank {rank}: expected {' or '.join(expected)}, got {ending.error}: "
                f"{ending.message}"
            )
        for word in fault.words if victim is None else ():
            if word not in ending.message:
                yield f"rank {rank}: expected '{word}' in: {ending.message}"
        if ending.error != "hangs" and ending.duration_s > BOUND_S:
            yield f"rank {rank}: ended after {ending.duration_s:.1f} s, more than {BOUND_S:g}"
    if leftovers:
        yield f"left behind: {', '.join(leftovers)}"


class _Job:
    """The ranks of one job."""

    def __init__(self, fault: Fault, shm_dir: Path, work_dir: Path) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__, "primitives._C"])
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._fault = fault
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(NUM_RANKS):
            ours, theirs = context.Pipe(duplex=False)
            job = (rank, self._store.port, str(shm_dir), str(work_dir))
            process = context.Process(target=live, args=(fault.id, job, theirs))
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def watch(self) -> list[Ending]:
        """How the ranks ended; those that hang are killed."""
        for rank, (_, report) in enumerate(self._ranks):
            if not report.poll(STARTUP_S) or not _begun(report):
                return [Ending(rank, "hangs", "it never began", STARTUP_S)]
        start = time.monotonic()
        ended: dict[int, float] = {}
        # A rank that is meant to hang need not be waited for once the others have ended.
        hanging = {rank for rank, ending in self._fault.victims.items() if ending == "hangs"}
        while (left := set(range(NUM_RANKS)) - set(ended)) and left != hanging:
            now = time.monotonic() - start
            if now > BOUND_S + 2:
                break
            wait([self._ranks[rank][0].sentinel for rank in left], 0.5)
            for rank in left:
                if not self._ranks[rank][0].is_alive():
                    ended[rank] = time.monotonic() - start
        watched_s = time.monotonic() - start
        return [self._ending(rank, ended.get(rank), watched_s) for rank in range(NUM_RANKS)]

    def _ending(self, rank: int, duration_s: float | None, watched_s: float) -> Ending:
        process, report = self._ranks[rank]
        try:
            error, message = report.recv() if report.poll(0) else ("", "")
        except EOFError:
            error, message = "", ""
        if duration_s is None:
            return Ending(rank, "hangs", f"{error} {message}".strip(), watched_s)
        if process.exitcode < 0:
            error, message = signal_name(-process.exitcode), message
        return Ending(rank, error or f"exit code {process.exitcode}", message, duration_s)

    def kill(self) -> None:
        for process, report in self._ranks:
            process.kill()
            process.join()
            report.close()


def _begun(report: Connection) -> bool:
    try:
        return bool(report.recv() == "begun")
    except EOFError:
        return False


def live(id: str, job: tuple[int, int, str, str], report: Connection) -> None:
    """The life of one rank, in a process of its own."""
    from scenarios.faults.catalogue import select

    rank, port, shm_dir, work_dir = job
    (fault,) = (fault for fault in select([id]) if fault.id == id)
    os.chdir(work_dir)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= {SHM_DIR.name: shm_dir, JOB: f"{rank} {port}", **fault.env}
    if fault.joins:
        join_world(JOIN_S)
        dist.barrier()
        world = dist.distributed_c10d._get_default_group()
        world._get_backend(torch.device("cpu")).set_timeout(TIMEOUT)
    report.send("begun")
    try:
        fault.body(rank)
    except BaseException as error:
        report.send((type(error).__name__, str(error)))
        sys.exit(1)
    report.send(("returned", ""))


def join_world(timeout_s: float) -> None:
    """init_process_group, in a process of a job."""
    rank, port = map(int, os.environ[JOB].split())
    primitives.backend.register()
    dist.init_process_group(
        "primitives",
        store=TCPStore("127.0.0.1", port, is_master=False),
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=timeout_s),
    )


@contextmanager
def _small_tmpfs(folder: Path, size: str) -> Iterator[bool]:
    """Mounts a memory file system; False where that is not allowed."""
    mount = f"mount -t tmpfs -o size={size} tmpfs {folder} 2>/dev/null"
    if os.geteuid() != 0 or os.system(mount) != 0:
        yield False
        return
    try:
        yield True
    finally:
        os.system(f"umount -l {folder}")


def table(results: Sequence[Result]) -> Any:
    """For the terminal (rich)."""
    from rich.table import Table

    rows = Table("id", "fault", "seen by another rank", "s", "left behind", "verdict")
    for result in results:
        told = [e for e in result.endings if e.message] or list(result.endings)
        seen = f"{told[0].error}: {told[0].message}"[:150].rstrip(": ") if told else result.skipped
        left = ", ".join(result.leftovers) or "nothing"
        rows.add_row(result.id, result.what, seen, f"{result.duration_s:.1f}", left, result.verdict)
    return rows
