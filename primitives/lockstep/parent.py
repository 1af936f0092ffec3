"""pytest itself with ``--ranks``: collects, reports and never dies; forked ranks run the tests."""

import os
import re
import secrets
import time
from collections.abc import Generator
from typing import Any

import pytest
import torch

from primitives.lockstep import forked, needs_ranks
from primitives.lockstep.control import Hub, listed
from primitives.lockstep.server import ForkServer
from primitives.lockstep.session import FREED_GRACE_S

EXIT_GRACE_S = 10.0
# Lines of faulthandler that are the same for every test.
MACHINERY = re.compile(
    r"  File .*/(_pytest|pluggy|pytest|primitives/lockstep)/.*\n|  File .<frozen runpy>.*\n"
    r"|Extension modules: .*\n"
)
OUTPUT_LIMIT = 20000  # characters of a lost rank's output in the report


class Ranks:
    """Ranks that live until a test fails.

    Args:
        server: forks them.
        num: how many.
        answer_timeout_s: how long they may be silent.
        captured: whether their output goes to files.
    """

    def __init__(
        self, server: ForkServer, num: int, answer_timeout_s: float, *, captured: bool
    ) -> None:
        self.server = server
        self.all = list(range(num))
        self.captured = captured
        self.output: dict[int, list[Any]] = {}
        address = f"\0lockstep/{os.getuid()}/{os.getpid()}/{secrets.token_hex(8)}"
        self.hub = Hub(address, num, answer_timeout_s)
        self.hub.watch(server.link.connection, self.on_ending)
        server.fork(num, address)

    def on_ending(self) -> None:
        self.server.receive()
        for rank in self.server.endings:
            if rank not in self.hub.leaving:
                self.hub.lose(f"rank {rank} died{self.hub.missing_from()}", [rank])

    def poll(self) -> list[tuple[int, dict[str, Any]]]:
        """What the ranks have to say to the parent."""
        self.hub.poll()
        if not self.hub.lost and time.monotonic() - self.hub.heard > self.hub.answer_timeout_s:
            self.hub.lose(f"no sign of life for {self.hub.answer_timeout_s:g} s", self.all)
        messages = []
        while self.hub.inbox:
            rank, message = self.hub.inbox.popleft()
            if "output" in message:
                if self.captured:
                    pid = message["pid"]
                    self.output[rank] = [forked.output_of(pid, d) for d in message["output"]]
            else:
                messages.append((rank, message))
        return messages

    def why_lost(self) -> str:
        """Ends what is left of lost ranks and tells all that is known about them."""
        hub, culprits = self.hub, self.hub.culprits
        dead = [r for r in culprits if r in hub.gone or r in self.server.endings]
        self.wait(EXIT_GRACE_S, dead)
        told = dict(self.server.endings)
        blocked = [r for r in culprits if r not in dead]
        self.server.abort(blocked)
        self.wait(1.0, blocked)
        lines = [hub.lost]
        lines += [f"rank {r} {told[r]}" for r in culprits if r in told]
        for rank in culprits or self.all:
            for name, file in zip(("stdout", "stderr"), self.output.get(rank, []), strict=False):
                if text := MACHINERY.sub("", file.read())[-OUTPUT_LIMIT:]:
                    lines.append(f"---- rank {rank}, {name} ----\n{text}")
        self.kill()
        return "\n".join(lines)

    def wait(self, timeout_s: float, ranks: list[int]) -> None:
        """Until the processes of ``ranks`` have ended, at most ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not set(ranks) <= set(self.server.endings) and time.monotonic() < deadline:
            for key, _ in self.hub.selector.select(0.1):
                key.data()

    def finish(self) -> list[tuple[int, str]]:
        """Lets the ranks tear down what they keep, and ends them; (rank, error) of what failed."""
        self.hub.broadcast({"finish": True})
        self.wait(EXIT_GRACE_S, self.all)
        late = [(rank, m["late"]) for rank, m in self.hub.inbox if "late" in m]
        late += [
            (rank, f"{how} while it tore down the session's fixtures")
            for rank, how in self.server.endings.items()
            if how != "exited with code 0"
        ]
        late += [
            (rank, f"did not tear down the session's fixtures within {EXIT_GRACE_S:g} s")
            for rank in self.server.pids.values()
        ]
        self.kill()
        return late

    def kill(self) -> None:
        self.server.kill()
        self.wait(EXIT_GRACE_S, self.all)
        self.hub.close()
        for files in self.output.values():
            for file in files:
                file.close()
        self.output = {}


class Parent:
    """The plugin of the pytest process that leads forked ranks."""

    def __init__(self, config: pytest.Config, num_ranks: int) -> None:
        if num_ranks < 1:
            raise pytest.UsageError(f"--ranks needs at least 1, got {num_ranks}")
        if config.option.usepdb:
            raise pytest.UsageError("--pdb needs a terminal, which forked ranks do not have")
        self.config = config
        self.num_ranks = num_ranks
        # A pool of native threads that importing the tests may start would be missing in a fork.
        self.num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.backend: str = config.getoption("--ranks-backend")
        self.answer_timeout_s: float = (
            config.getoption("--ranks-limit-s")
            + config.getoption("--ranks-timeout-s")
            + 2 * FREED_GRACE_S
        )
        self.server: ForkServer | None = None
        self.ranks: Ranks | None = None
        self.order: list[int] = []  # indices of the tests for ranks
        self.last: pytest.Item | None = None

    def pytest_report_header(self) -> str:
        return f"lockstep: {self.num_ranks} forked ranks, backend {self.backend}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        self.order = [i for i, item in enumerate(session.items) if needs_ranks(item)]
        if not self.order:
            torch.set_num_threads(self.num_threads)
            return (yield)
        self.warm_up()
        try:
            self.server = ForkServer(lambda rank, address: self.be_rank(session, rank, address))
        except RuntimeError as error:
            raise pytest.UsageError(str(error)) from None
        finally:
            torch.set_num_threads(self.num_threads)
        try:
            result = yield
            self.end_ranks()
            return result
        finally:
            if self.ranks is not None:
                self.ranks.kill()
            self.server.close()

    def be_rank(self, session: pytest.Session, rank: int, address: str) -> None:
        """In a forked process."""
        self.config.pluginmanager.unregister(self)
        share = max(1, len(os.sched_getaffinity(0)) // self.num_ranks)
        torch.set_num_threads(self.num_threads if "OMP_NUM_THREADS" in os.environ else share)
        forked.be_rank(session, self.num_ranks, rank, address)

    def warm_up(self) -> None:
        """Loads once what every rank would load, and fixes what all ranks share."""
        if self.backend == "primitives":
            import primitives._C
            import primitives.backend

            primitives.backend.register()
        self.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        capture: Any = self.config.pluginmanager.get_plugin("capturemanager")
        capture.read_global_capture()  # nothing of the parent's must show up in a rank

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Any:
        index = item.session.items.index(item)
        if index not in self.order:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        self.run(item, index)
        # What ordinary tests before this one have set up here and the next one does not need.
        call = pytest.CallInfo.from_call(
            lambda: item.session._setupstate.teardown_exact(nextitem), when="teardown"
        )
        if call.excinfo is not None:
            item.ihook.pytest_runtest_logreport(
                report=pytest.TestReport.from_item_and_call(item, call)
            )
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(optionalhook=True)
    def pytest_timeout_set_timer(self, item: pytest.Item) -> bool | None:
        """pytest-timeout's clock runs in the ranks."""
        return True if item.session.items.index(item) in self.order else None

    def run(self, item: pytest.Item, index: int) -> None:
        """Runs one test on the ranks and reports it."""
        assert self.server is not None
        if self.ranks is None:
            captured = self.config.option.capture == "fd"
            self.ranks = Ranks(
                self.server, self.num_ranks, self.answer_timeout_s, captured=captured
            )
        self.last = item
        following = [i for i in self.order if i > index]
        command = {"run": index, "next": following[0] if following else None}
        started, told, done, failed = False, 0, 0, False
        while done < self.num_ranks:
            messages = self.ranks.poll()
            if not started and len(self.ranks.hub.links) == self.num_ranks:
                self.ranks.hub.broadcast(command)
                started = True
            for _, message in messages:
                if "report" in message:
                    report = self.report_of(message)
                    failed |= report.outcome == "failed"
                    told += 1
                    item.ihook.pytest_runtest_logreport(report=report)
                elif "done" in message:
                    done += 1
                elif "exit" in message:
                    pytest.exit(message["exit"])
                elif "warning" in message:
                    self.warn(message)
            if self.ranks.hub.lost:
                self.report_lost(item, told, self.ranks.why_lost())
                self.ranks = None
                return
        if failed:
            self.end_ranks()

    def report_of(self, message: dict[str, Any]) -> pytest.TestReport:
        fields = message["report"]
        if fields["outcome"] == "skipped" and isinstance(fields["longrepr"], list):
            fields["longrepr"] = tuple(fields["longrepr"])  # pytest insists, JSON has none
        report: pytest.TestReport = self.config.hook.pytest_report_from_serializable(
            config=self.config, data=fields
        )
        return report

    def warn(self, message: dict[str, Any]) -> None:
        self.config.hook.pytest_warning_recorded.call_historic(
            kwargs={
                "warning_message": forked.unpack_warning(message["warning"]),
                "when": "runtest",
                "nodeid": message["nodeid"],
                "location": message["location"],
            }
        )

    def report_lost(self, item: pytest.Item, told: int, why: str) -> None:
        """The reports that the ranks could not make any more."""
        phases = ["setup", "call", "teardown"][min(told, 2) :]
        self.report(item, phases[0], f"lost in the {phases[0]} of {item.nodeid}: {why}")
        if phases[-1] != phases[0]:
            self.report(item, phases[-1], None)

    def report(self, item: pytest.Item, when: Any, error: str | None) -> None:
        report = pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords=dict.fromkeys(item.keywords, 1),
            outcome="passed" if error is None else "failed",
            longrepr=error,
            when=when,
        )
        item.ihook.pytest_runtest_logreport(report=report)

    def end_ranks(self) -> None:
        """Ends these ranks; the next test gets fresh ones."""
        if self.ranks is None:
            return
        ranks, self.ranks = self.ranks, None
        late = ranks.finish()
        if late and self.last is not None:
            by_error: dict[str, list[int]] = {}
            for rank, error in late:
                by_error.setdefault(error, []).append(rank)
            text = "\n".join(
                f"---- rank {listed(which)} ----\n{error}" for error, which in by_error.items()
            )
            self.report(self.last, "teardown", f"tearing down what outlives a test failed\n{text}")
