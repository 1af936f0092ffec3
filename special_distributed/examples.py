"""Property tests on several ranks: hypothesis draws the same examples everywhere, in step."""

import functools
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy


class ExampleFailed(BaseException):
    """Not an Exception: hypothesis would replay the example to shrink it, on this rank alone."""


def examples(
    num: int, **strategies: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on ``num`` examples drawn from ``strategies``, the same ones on every rank.

    The seed comes from the test itself. The first failing example ends the test on its rank, and
    lockstep then frees the others.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*fixtures: Any, **arguments: Any) -> None:
            try:
                test(*fixtures, **arguments)
            except Exception as error:
                drawn = ", ".join(f"{name}={arguments[name]!r}" for name in strategies)
                raise ExampleFailed(f"{type(error).__name__} with {drawn}") from error

        in_step = settings(
            max_examples=num,
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        )
        return in_step(given(**strategies)(run))

    return decorate
