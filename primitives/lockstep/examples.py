"""hypothesis in lockstep: the same examples on every rank, and a failure on one is one on all.

[Note: examples in step] Each rank runs hypothesis itself, from the same seed and without a
database or a clock. After each example the ranks exchange how it ended; when it failed on any
rank, every rank raises the same exception, so that all of them take the same next step and shrink
together. What one rank drew must not depend on what it computed: digests of the choices are
compared, too.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from primitives.lockstep.control import listed
from primitives.lockstep.outcome import causes

if TYPE_CHECKING:
    from primitives.lockstep.session import RankSession

IN_STEP = "_in_lockstep"


class ExampleFailed(Exception):
    """An example failed on some rank; raised on all. Each cause has a subclass of its own.

    hypothesis tells failures apart by type and place, and shrinks each towards itself. So a
    subclass stands for the type and place of the error on the rank that failed.
    """

    def __init__(self, message: str, original: BaseException | None) -> None:
        super().__init__(message)
        self.original = original

    def on_this_rank(self) -> BaseException | None:
        """This rank's own error with what hypothesis says about the example, if it had one."""
        if self.original is not None:
            for note in getattr(self, "__notes__", []):
                self.original.add_note(note)
        return self.original


class ExamplesDiffer(BaseException):
    """The ranks did not draw alike; not an Exception, so hypothesis ends the test here."""


class Examples:
    """Takes the hypothesis tests of one rank from example to example.

    Args:
        session: this rank's.
    """

    def __init__(self, session: "RankSession") -> None:
        self.session = session
        self.failures: dict[str, type[ExampleFailed]] = {}
        self.stale = False  # the last example failed, and its fixtures have not been renewed

    def prepare(self, item: pytest.Item) -> None:
        """Makes a hypothesis test run in step; other tests stay as they are."""
        self.stale = False
        test = getattr(item, "obj", None)
        test = getattr(test, "__func__", test)
        if not getattr(test, "is_hypothesis_test", False):
            return
        handle: Any = test.hypothesis  # type: ignore[union-attr]
        if hasattr(handle.inner_test, IN_STEP):
            return
        freeze_constants()
        handle.inner_test = self.in_step(handle.inner_test)
        test._hypothesis_internal_use_settings = settings_in_step(test)  # type: ignore[union-attr]

    def in_step(self, test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*positional: Any, **arguments: Any) -> None:
            __tracebackhide__ = True
            session, error = self.session, None
            session.in_example = True
            try:
                if self.stale:
                    session.renew_fixtures(arguments)
                    self.stale = False
                test(*positional, **arguments)
            except (KeyboardInterrupt, SystemExit, GeneratorExit, pytest.exit.Exception):
                raise
            except BaseException as caught:  # also what hypothesis and pytest throw to steer
                error = caught
            self.agree(error)

        setattr(run, IN_STEP, True)
        return run

    def agree(self, error: BaseException | None) -> None:
        """Ends an example on all ranks alike, as the worst of them ended it."""
        __tracebackhide__ = True
        from hypothesis.control import current_build_context

        session = self.session
        session.arrive()
        kind, place = ending(error)
        if error is not None:
            session.tell_failed()
        choices = repr(current_build_context().data.choices)
        arrivals = session.meet(
            f"an example of {session.item.nodeid}",
            {
                "kind": kind,
                "place": place,
                "error": "" if error is None else f"{type(error).__name__}: {error}",
                "drawn": hashlib.sha256(choices.encode()).hexdigest(),
            },
        )
        theirs = [arrival.value for arrival in arrivals]
        kinds = {t["kind"] for t in theirs}
        drew_alike = len({t["drawn"] for t in theirs}) == 1
        agreed = drew_alike and len(kinds) == 1 and kind != "failed"
        if not agreed or any(arrival.freed for arrival in arrivals):
            session.dirty = self.stale = True
        if agreed:
            if error is not None:
                raise error
            return
        each = "\n".join(
            f"rank {r}: {a.value['kind']} {a.freed or a.value['error']}"
            for r, a in enumerate(arrivals)
        )
        if not drew_alike:
            raise ExamplesDiffer(f"the ranks drew different examples\n{each}")
        failed = [r for r, t in enumerate(theirs) if t["kind"] == "failed"]
        blamed = causes(arrivals, failed)
        if len(kinds) > 1 and not blamed:
            # One rank rejected or skipped the example while the others waited for it.
            blamed, place, message = [], "disagreement", f"the ranks disagree\n{each}"
        else:
            blamed = blamed or failed
            first = theirs[blamed[0]]
            place = first["place"]
            message = f"the example failed on rank {listed(blamed)}\n{first['error']}"
        failure = self.failures.setdefault(place, type("ExampleFailed", (ExampleFailed,), {}))
        raise failure(message, error if session.info.rank in blamed else None)


def ending(error: BaseException | None) -> tuple[str, str]:
    """How an example ended on this rank, and the type and place of its error."""
    from hypothesis.errors import StopTest, UnsatisfiedAssumption
    from hypothesis.internal.escalation import InterestingOrigin

    if error is None:
        return "passed", ""
    if isinstance(error, UnsatisfiedAssumption):
        return "rejected", ""
    if isinstance(error, StopTest):
        return "stopped", ""
    if isinstance(error, pytest.skip.Exception):
        return "skipped", ""
    return "failed", str(InterestingOrigin.from_exception(error))


@functools.cache
def freeze_constants() -> None:
    """hypothesis favours constants of the modules it finds imported: of those all ranks have now.

    Later on one rank may import what others do not.
    """
    from hypothesis.internal.conjecture import providers

    known = providers._get_local_constants()
    providers._get_local_constants = lambda: known


def settings_in_step(test: Any) -> Any:
    """The settings of a test without all that could take the ranks apart.

    A seed from the test itself, or from ``--hypothesis-seed``; no database, which holds what one
    rank met in the past; no phase or check that looks at the clock, at one rank's scores or at the
    lines that one rank ran.
    """
    from hypothesis import HealthCheck, Phase, core, settings

    own: Any = getattr(test, "_hypothesis_internal_use_settings", settings.default)
    return settings(
        own,
        derandomize=core.global_force_seed is None,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[p for p in own.phases if p in (Phase.explicit, Phase.generate, Phase.shrink)],
        suppress_health_check=[
            *own.suppress_health_check,
            HealthCheck.too_slow,
            HealthCheck.function_scoped_fixture,  # they are set up again after a failed example
        ],
    )
