"""A property test in one line: so many examples, drawn from these strategies."""

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy


def examples(
    num: int, **strategies: SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``given`` and ``settings`` of hypothesis; lockstep keeps the ranks in step."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return settings(max_examples=num)(given(**strategies)(test))

    return decorate
