"""What a pytest session does on one rank, however it was started: it stays in step with the others.

[Note: lockstep] After each phase (setup, call, teardown) of a test the ranks exchange their
outcomes over the control plane (never through the collectives under test), and every rank's report
becomes the one of all ranks. A rank that waits in a collective for a rank that has failed is freed
by aborting the process groups; the next test gets new ones. Where nothing helps (a rank died, a
rank stays blocked), the hub declares these ranks lost.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Generator
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from primitives.lockstep.control import POLL_S, Listener, Member
from primitives.lockstep.examples import ExampleFailed, Examples
from primitives.lockstep.outcome import Arrival, Outcome, merge
from primitives.rendezvous import RankInfo

EXIT_LOST = 3
GRACE_S = 1.0  # for a rank to fail by itself when another one has
EXAMPLE_GRACE_S = 0.1  # the same within a hypothesis test, which may fail a hundred times
FREED_GRACE_S = 5.0  # beyond a collective's own timeout, for an abort to take effect


class RankSession(Listener):
    """The plugin of one rank; the control plane's thread watches over the main thread.

    Args:
        config: of pytest, with the options of this plugin.
        info: this rank.
        address: where the hub listens.
    """

    def __init__(self, config: pytest.Config, info: RankInfo, address: str) -> None:
        self.info = info
        self.backend: str = config.getoption("--ranks-backend")
        self.timeout_s: float = config.getoption("--ranks-timeout-s")
        self.limit_s: float = config.getoption("--ranks-limit-s")
        self.store: Any = None
        self.dirty = False  # a failure may have left the process groups out of step
        self.examples = Examples(self)
        self.item: Any = None

        self.lock = threading.RLock()
        self.step = 0  # how often the ranks have met, the same number everywhere
        self.phase = "start"
        self.started = 0.0
        self.in_test = False
        self.in_example = False
        self.at_gather = True
        self.failed_at: float | None = None
        self.freed = ""
        self.freed_at: float | None = None
        self.arrived_at = 0.0
        self.member = Member(address, info.rank)

    def start_watch(self, signals: int | None = None) -> None:
        threading.Thread(
            target=self.member.listen,
            args=(self, signals),
            name="lockstep watch",
            daemon=True,
        ).start()

    # The control plane's thread.

    def on_signals(self, numbers: bytes) -> None:
        """Signals that arrived at the descriptor given to ``start_watch``."""

    def on_values(self) -> None:
        """All have met; another rank may fail in the next step before the main thread runs."""
        with self.lock:
            self.step += 1
            self.failed_at, self.freed, self.freed_at = None, "", None
            self.started, self.at_gather = time.monotonic(), False

    def on_failed(self, step: int) -> None:
        with self.lock:
            if step == self.step and self.failed_at is None:
                self.failed_at = time.monotonic()

    def tick(self) -> float:
        """Frees the main thread when that is due; the seconds until it may be due next."""
        now = time.monotonic()
        with self.lock:
            if not self.in_test or self.at_gather:
                return POLL_S
            if self.freed_at is not None:
                if now - self.freed_at > self.timeout_s + FREED_GRACE_S:
                    self.freed_at = now
                    where = main_thread_stack()
                    self.member.link.send(
                        {"dying": f"is still blocked after abort ({self.freed}), at\n{where}"}
                    )
            elif self.failed_at is not None:
                grace_s = EXAMPLE_GRACE_S if self.in_example else GRACE_S
                remaining_s = self.failed_at + grace_s - now
                if remaining_s > 0:
                    return min(remaining_s, POLL_S)
                self.free("another rank had failed")
            elif now - self.started > self.limit_s:
                self.tell_failed()
                self.free(f"the limit of {self.limit_s:g} s for a test passed")
        return POLL_S

    def free(self, why: str) -> None:
        self.freed, self.freed_at = why, time.monotonic()
        abort_process_groups()

    def on_end(self, reason: str) -> NoReturn:
        """Ends this rank at once: nothing can be trusted to unwind any more."""
        os._exit(EXIT_LOST)

    # The main thread.

    def tell_failed(self) -> None:
        self.member.link.send({"failed": self.step})

    def arrive(self) -> None:
        """The main thread is about to meet the others: from now on nothing must free it."""
        with self.lock:
            if not self.at_gather:
                self.at_gather, self.arrived_at = True, time.monotonic()

    def meet(self, key: str, value: Any) -> list[Arrival]:
        """What every rank brings, by rank; a new step begins.

        Args:
            key: what all ranks must have come to.
            value: what this rank brings, as JSON can carry it.
        """
        self.arrive()
        mine = Arrival(value, self.arrived_at, self.freed, self.freed_at)
        return [Arrival(**fields) for fields in self.member.gather(key, asdict(mine))]

    def open_store(self) -> None:
        """All ranks together, before the first test: rank 0 serves the store of the groups."""
        serve, wait = self.info.rank == 0, timedelta(seconds=self.limit_s)
        store = TCPStore("127.0.0.1", 0, None, True, wait, False) if serve else None
        port: int = self.meet("store", store.port if store else None)[0].value
        self.store = store or TCPStore("127.0.0.1", port, None, False, wait, False)

    def world(self) -> dist.ProcessGroup:
        """The process group of all ranks; a new one after a failure."""
        if self.dirty and dist.is_initialized():
            abort_process_groups()
            dist.destroy_process_group()
        self.dirty = False
        if not dist.is_initialized():
            if self.backend == "primitives":
                import primitives.backend

                primitives.backend.register()
            dist.init_process_group(
                self.backend,
                store=PrefixStore(f"step {self.step}", self.store),
                rank=self.info.rank,
                world_size=self.info.world_size,
                timeout=timedelta(seconds=self.timeout_s),
            )
        world = dist.group.WORLD
        assert world is not None
        return world

    def renew_fixtures(self, arguments: dict[str, Any]) -> None:
        """After a failed example: what hangs on the old process groups is set up again."""
        item, state = self.item, self.item.session._setupstate
        try:
            state.teardown_exact(item.parent)
        except Exception as error:  # what a failure left behind; the last example's teardown counts
            print(f"teardown after a failed example: {error!r}", file=sys.stderr)
        if "world" in item.fixturenames:
            self.world()
        item._initrequest()
        state.setup(item)
        arguments.update({n: v for n, v in item.funcargs.items() if n in arguments})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.item = item
        self.examples.prepare(item)
        with self.lock:
            self.in_test, self.phase, self.started = True, "setup", time.monotonic()
        try:
            return (yield)
        finally:
            with self.lock:
                self.in_test = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        # Before any code of the test's can fail on one rank and keep the others waiting for it.
        if "world" in getattr(item, "fixturenames", ()):
            self.world()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        self.arrive()
        self.in_example = False
        own = True
        if call.excinfo is not None:
            self.tell_failed()
            if isinstance(call.excinfo.value, ExampleFailed):
                original = call.excinfo.value.on_this_rank()
                own = original is not None
                if original is not None:  # show where the test failed, not where all ranks met
                    call.excinfo = pytest.ExceptionInfo.from_exception(original)
        report = yield
        outcome = Outcome.of(report, own=own)
        if merge(report, self.meet(f"{call.when} of {item.nodeid}", asdict(outcome))):
            self.dirty = True
        self.on_merged(report)
        self.phase = "call" if call.when == "setup" else "teardown"
        return report

    def on_merged(self, report: pytest.TestReport) -> None:
        """The report of a phase, the same on all ranks by now."""

    def close_groups(self) -> None:
        if dist.is_initialized():
            if self.dirty:
                abort_process_groups()
            dist.destroy_process_group()


def main_thread_stack() -> str:
    """Where the main thread is, from the test on."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    stack = traceback.extract_stack(frame)
    machinery = [i for i, f in enumerate(stack) if "/_pytest/" in f.filename]
    return "".join(traceback.format_list(stack[max(machinery, default=-1) + 1 :]))


def abort_process_groups() -> None:
    """Frees every wait in every process group of this rank; they cannot be used any more."""
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            group.abort()
        except RuntimeError as error:  # one group's refusal must not keep the others waiting
            print(f"abort of process group {group.group_name}: {error}", file=sys.stderr)
