"""pytest plugin: one pytest session per rank, one merged outcome per test.

    mpirun -n 4 pytest special_distributed
    torchrun --nproc-per-node 4 -m pytest special_distributed

[Note: lockstep] After each phase (setup, call, teardown) of a test the ranks exchange their
outcomes over the control plane (never through the collectives under test). A failure on any rank
fails the test once, on all ranks, and rank 0 alone prints it, with the traceback of the rank it
came from. A rank that waits in a collective for a rank that has failed is freed by aborting the
process groups; the next test gets new ones. Where nothing helps (a rank died, a rank stays
blocked), the session ends with a report and exit code 3.
"""

import faulthandler
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator
from datetime import timedelta
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from primitives.rendezvous import RankInfo, rank_info
from special_distributed.control import Hub, Member, listed

HOW_TO_RUN = (
    "these tests run on several ranks at once and need a launcher:\n"
    "    mpirun -n 4 pytest special_distributed\n"
    "    torchrun --nproc-per-node 4 -m pytest special_distributed\n"
    "    bash special_distributed/run_all.sh"
)
EXIT_SESSION_LOST = 3
EXIT_GRACE_S = 30.0
FREED_GRACE_S = 5.0  # beyond a collective's own timeout, for an abort to take effect


class Outcome:
    """One rank's outcome of one phase of one test, as it travels over the control plane."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.outcome: str = fields["outcome"]
        self.text: str = fields["text"]
        self.headline: str = fields["headline"]  # the error without its traceback
        self.freed: str = fields["freed"]  # why this rank was freed from a wait, or ""

    @staticmethod
    def of(report: pytest.TestReport, freed: str) -> dict[str, Any]:
        text = "" if report.longrepr is None else report.longreprtext
        crash = getattr(report.longrepr, "reprcrash", None)
        headline = text if crash is None else f"{crash.path}:{crash.lineno}: {crash.message}"
        if report.outcome == "failed":
            for title, content in report.sections:
                text += f"\n{title}:\n{content[-2000:]}"
        return {"outcome": report.outcome, "headline": headline, "text": text, "freed": freed}


def merge(report: pytest.TestReport, outcomes: list[Outcome]) -> None:
    """Turns this rank's report into the one of all ranks."""
    failed = [r for r, o in enumerate(outcomes) if o.outcome == "failed"]
    if not failed:
        if len({o.outcome for o in outcomes}) > 1:
            each = "\n".join(f"rank {r}: {o.outcome} {o.text}" for r, o in enumerate(outcomes))
            report.outcome, report.longrepr = "failed", f"the ranks disagree\n{each}"
        return
    causes = [r for r in failed if not outcomes[r].freed] or failed
    lines = [f"failed on rank {listed(causes)} of {len(outcomes)}"]
    lines += [f"rank {r} was freed: {o.freed}" for r, o in enumerate(outcomes) if o.freed]
    by_headline: dict[str, list[int]] = {}
    for r in causes:
        by_headline.setdefault(outcomes[r].headline, []).append(r)
    for ranks in by_headline.values():  # the same error is shown once, as the first rank saw it
        lines.append(f"---- rank {listed(ranks)} ----\n{outcomes[ranks[0]].text}")
    report.outcome, report.longrepr, report.sections = "failed", "\n".join(lines), []


class Lockstep:
    """The plugin of one rank; the control plane's thread watches over the main thread."""

    def __init__(self, config: pytest.Config, info: RankInfo) -> None:
        self.info = info
        self.backend: str = config.getoption("--ranks-backend")
        self.timeout_s: float = config.getoption("--ranks-timeout-s")
        self.limit_s: float = config.getoption("--ranks-limit-s")
        self.stdout = os.dup(1)  # capturing is suspended now: this is the real one
        self.silence = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
        self.failures: list[str] = []
        self.collection_errors: list[str] = []
        self.store: Any = None
        self.epoch = 0
        self.dirty = False  # a failure may have left the process groups out of step

        self.lock = threading.RLock()
        self.num_tests = 0
        self.test = ""
        self.phase = "collection"
        self.started = 0.0
        self.at_gather = True
        self.failed_at: float | None = None
        self.freed = ""
        self.freed_at = 0.0
        self.terminated_at: float | None = None

        user_job = hashlib.sha256(f"{os.getuid()}/{info.job}".encode()).hexdigest()[:16]
        address = f"\0lockstep/{user_job}"
        self.hub: Hub | None = None
        if info.rank == 0:
            longest_s = self.limit_s + self.timeout_s + 2 * FREED_GRACE_S
            self.hub = Hub(address, info.world_size, longest_s)
            self.hub.start()
        self.member = Member(address, info.rank)
        threading.Thread(
            target=self.member.listen,
            args=(self.watch, self.on_failed, self.end, self.catch_sigterm(), self.on_signal),
            name="lockstep watch",
            daemon=True,
        ).start()

    # The control plane's thread.

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

    def on_signal(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers and self.terminated_at is None:
            self.terminated_at = time.monotonic()

    def on_failed(self, test: int) -> None:
        with self.lock:
            if test == self.num_tests and self.failed_at is None:
                self.failed_at = time.monotonic()

    def watch(self) -> None:
        now = time.monotonic()
        if self.terminated_at is not None and now - self.terminated_at > 1:
            self.end("SIGTERM from outside")
        with self.lock:
            if not self.test or self.at_gather:
                return
            if not self.freed:
                if self.failed_at is not None and now - self.failed_at > 1:
                    self.free("another rank had failed")
                elif now - self.started > self.limit_s:
                    self.member.link.send({"failed": self.num_tests})
                    self.free(f"the limit of {self.limit_s:g} s for a test passed")
            elif now - self.freed_at > self.timeout_s + FREED_GRACE_S:
                self.freed_at = now
                blocked = "".join(traceback.format_stack(main_thread_frame()))
                self.member.link.send(
                    {"dying": f"is still blocked after abort ({self.freed}), at\n{blocked}"}
                )

    def free(self, why: str) -> None:
        self.freed, self.freed_at = why, time.monotonic()
        abort_process_groups()

    def end(self, reason: str) -> NoReturn:
        """Ends the session of this rank at once: nothing can be trusted to unwind any more."""
        if self.info.rank == 0:
            at = f"in {self.test}, {self.phase}" if self.test else f"in {self.phase}"
            earlier = "".join(f"\n{text}\n" for text in self.failures)
            text = f"\n{earlier}\nlockstep: session ended: {reason} ({at})\n"
            os.write(self.stdout, text.encode())
            time.sleep(0.2)  # the other ranks end by themselves before a launcher kills them
        os._exit(EXIT_SESSION_LOST)

    # The main thread.

    def world(self) -> dist.ProcessGroup:
        """The process group of all ranks; a new one after a failed test."""
        if self.dirty and dist.is_initialized():
            dist.destroy_process_group()
        self.dirty = False
        if not dist.is_initialized():
            if self.store is None:
                self.store = self.make_store()
            self.epoch += 1
            if self.backend == "primitives":
                import primitives.backend

                primitives.backend.register()
            dist.init_process_group(
                self.backend,
                store=PrefixStore(f"epoch {self.epoch}", self.store),
                rank=self.info.rank,
                world_size=self.info.world_size,
                timeout=timedelta(seconds=self.timeout_s),
            )
        world = dist.group.WORLD
        assert world is not None
        return world

    def make_store(self) -> Any:
        serve = self.info.rank == 0
        wait = timedelta(seconds=self.limit_s)
        store = TCPStore("127.0.0.1", 0, None, True, wait, False) if serve else None
        port = self.gather("store", store.port if store else None)[0]
        return store or TCPStore("127.0.0.1", port, None, False, wait, False)

    def gather(self, key: str, value: Any) -> list[Any]:
        with self.lock:
            self.at_gather = True
        values = self.member.gather(key, value)
        with self.lock:
            self.at_gather = False
        return values

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if self.info.rank != 0:
            # Only rank 0 speaks: its reports hold what every rank has to say.
            session.config.get_terminal_writer()._file = self.silence

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_errors.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        ids = [item.nodeid for item in session.items]
        mine = {"ids": ids, "errors": self.collection_errors}
        theirs = self.gather("collection", mine)
        if all(other["ids"] == ids for other in theirs):
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

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self.lock:
            self.num_tests += 1
            self.test, self.phase, self.started = item.nodeid, "setup", time.monotonic()
            self.failed_at, self.freed = None, ""
        try:
            return (yield)
        finally:
            with self.lock:
                self.test = ""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        with self.lock:
            self.at_gather = True
        if report.outcome == "failed":
            self.member.link.send({"failed": self.num_tests})
        key = f"{call.when} of {item.nodeid}"
        outcomes = [Outcome(o) for o in self.gather(key, Outcome.of(report, self.freed))]
        merge(report, outcomes)
        with self.lock:
            if report.outcome == "failed":
                self.dirty = True
                self.failures.append(f"FAILED {key}\n{report.longrepr}")
            # Every rank knows the outcome of this phase; the next one starts anew.
            self.phase = "call" if call.when == "setup" else "teardown"
            self.failed_at, self.freed, self.started = None, "", time.monotonic()
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        yield
        self.phase = "the end of the session"
        # An exit handler that blocks in native code must not hold the job.
        faulthandler.dump_traceback_later(
            EXIT_GRACE_S, exit=True, file=sys.__stderr__ or sys.stderr
        )
        statuses = self.gather("finish", int(session.exitstatus))
        if dist.is_initialized():
            if self.dirty:
                abort_process_groups()
            dist.destroy_process_group()
        # Launchers kill the job as soon as one rank fails: rank 0, the last one, speaks for all.
        if self.info.rank != 0:
            session.exitstatus = 0
        elif session.exitstatus == 0:
            session.exitstatus = max(statuses)
        self.member.link.send({"bye": True})
        if self.hub is not None:
            self.hub.join(EXIT_GRACE_S)

    def pytest_report_header(self) -> str:
        return f"lockstep: {self.info.world_size} ranks, backend {self.backend}"


def main_thread_frame() -> Any:
    return sys._current_frames()[threading.main_thread().ident or 0]


def abort_process_groups() -> None:
    """Frees every wait in every process group of this rank; they cannot be used any more."""
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            group.abort()
        except RuntimeError as error:  # one group's refusal must not keep the others waiting
            print(f"abort of process group {group.group_name}: {error}", file=sys.stderr)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lockstep", "one session per rank, one outcome per test")
    group.addoption("--ranks-backend", default="primitives", help="process group backend")
    group.addoption(
        "--ranks-timeout-s", type=float, default=30.0, help="timeout of a collective, in seconds"
    )
    group.addoption(
        "--ranks-limit-s", type=float, default=120.0, help="limit of a test, in seconds"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.collectonly or config.option.help:
        return
    try:
        info = rank_info()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if info is None:
        raise pytest.UsageError(HOW_TO_RUN)
    if info.rank != 0:
        config.option.xmlpath = None  # one JUnit file, rank 0's
    if "OMP_NUM_THREADS" not in os.environ:
        num_cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, num_cores // info.world_size))
    config.pluginmanager.register(Lockstep(config, info), "lockstep session")


def session_of(request: pytest.FixtureRequest) -> Lockstep:
    session = request.config.pluginmanager.get_plugin("lockstep session")
    assert isinstance(session, Lockstep)
    return session


@pytest.fixture
def world(request: pytest.FixtureRequest) -> dist.ProcessGroup:
    """The process group of all ranks, also torch.distributed's default one."""
    return session_of(request).world()


@pytest.fixture(scope="session")
def rank(request: pytest.FixtureRequest) -> int:
    """This rank."""
    return session_of(request).info.rank
