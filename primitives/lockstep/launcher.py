"""One pytest session per rank, started by torchrun, mpirun or srun; rank 0 speaks for all."""

import faulthandler
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from typing import NoReturn

import pytest
import torch

from primitives.lockstep.control import Hub, listed
from primitives.lockstep.session import EXIT_LOST, FREED_GRACE_S, RankSession
from primitives.rendezvous import RankInfo

EXIT_GRACE_S = 120.0


class LaunchedRank(RankSession):
    """The plugin of one rank under a launcher; on rank 0 a thread of it is the hub."""

    def __init__(self, config: pytest.Config, info: RankInfo) -> None:
        self.stdout = os.dup(1)  # capturing is suspended now: this is the real one
        self.silence = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
        self.failures: list[str] = []
        self.collection_errors: list[str] = []
        self.terminated_at: float | None = None
        self.hub: Hub | None = None
        self.serving: threading.Thread | None = None
        user_job = hashlib.sha256(f"{os.getuid()}/{info.job}".encode()).hexdigest()[:16]
        address = f"\0lockstep/{user_job}"
        if info.rank == 0:
            longest_s = config.getoption("--ranks-limit-s") + config.getoption("--ranks-timeout-s")
            self.hub = Hub(address, info.world_size, longest_s + 2 * FREED_GRACE_S)
            self.serving = threading.Thread(target=self.hub.serve, name="lockstep hub", daemon=True)
            self.serving.start()
        if info.rank != 0:
            config.option.xmlpath = None  # one JUnit file, rank 0's
        if "OMP_NUM_THREADS" not in os.environ:
            num_cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, num_cores // info.world_size))
        super().__init__(config, info, address)
        self.start_watch(self.catch_sigterm())

    def catch_sigterm(self) -> int:
        """A descriptor that becomes readable on SIGTERM, even while the main thread is blocked.

        A launcher sends SIGTERM to the ranks that are left when one has died: there is still time
        to say which one.
        """
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        return readable

    def on_signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers and self.terminated_at is None:
            self.terminated_at = time.monotonic()

    def tick(self) -> float:
        if self.terminated_at is not None and time.monotonic() - self.terminated_at > 1:
            self.on_end("SIGTERM from outside")
        return super().tick()

    def on_end(self, reason: str) -> NoReturn:
        if self.info.rank == 0:
            at = f"in {self.item.nodeid}, {self.phase}" if self.in_test else f"in {self.phase}"
            earlier = "".join(f"\n{text}\n" for text in self.failures)
            text = f"\n{earlier}\nlockstep: session ended: {reason} ({at})\n"
            os.write(self.stdout, text.encode())
            time.sleep(0.2)  # the other ranks end by themselves before a launcher kills them
        os._exit(EXIT_LOST)

    def on_merged(self, report: pytest.TestReport) -> None:
        if report.outcome == "failed":
            self.failures.append(f"FAILED {report.when} of {report.nodeid}\n{report.longrepr}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.phase = "collection"
        if self.info.rank != 0:
            # Only rank 0 speaks: its reports hold what every rank has to say.
            session.config.get_terminal_writer()._file = self.silence

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_errors.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        ids = [item.nodeid for item in session.items]
        mine = {"ids": ids, "errors": self.collection_errors}
        theirs = [arrival.value for arrival in self.meet("collection", mine)]
        if all(other["ids"] == ids for other in theirs):
            self.open_store()
            return
        lines = ["lockstep: the ranks collected different tests"]
        union = sorted({i for other in theirs for i in other["ids"]})
        for node in union:
            have = [r for r, other in enumerate(theirs) if node in other["ids"]]
            if len(have) < len(theirs):
                lines.append(f"  {node}: only on rank {listed(have)}")
        if len(lines) == 1:
            lines.append("  the same tests in another order")
        for r, other in enumerate(theirs):
            lines += [f"---- rank {r} ----\n{error}" for error in other["errors"]]
        session.shouldfail = False
        pytest.exit("\n".join(lines), pytest.ExitCode.USAGE_ERROR)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        self.phase = "the end of the session"
        # What blocks in native code, a fixture's end or an exit handler, must not hold the job.
        faulthandler.dump_traceback_later(
            EXIT_GRACE_S, exit=True, file=sys.__stderr__ or sys.stderr
        )
        yield
        arrivals = self.meet("finish", int(session.exitstatus))
        self.close_groups()
        # Launchers kill the job as soon as one rank fails: rank 0, the last one, speaks for all.
        if self.info.rank != 0:
            session.exitstatus = 0
        elif session.exitstatus == 0:
            session.exitstatus = max(arrival.value for arrival in arrivals)
        self.member.link.send({"bye": True})
        if self.serving is not None:
            self.serving.join(EXIT_GRACE_S)

    def pytest_report_header(self) -> str:
        return f"lockstep: {self.info.world_size} ranks, backend {self.backend}"
