"""Which kernels training uses: canonical ones, or the library's. This is the one place that knows.

Code that trains imports ``kernels`` from here. It stands for ``primitives.canonical``, or inside
``use("native")`` for ``primitives.native``, which has the functions that
training uses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from primitives import canonical, native

__all__ = ["kernels", "use"]

_MODULES: dict[str, ModuleType] = {"canonical": canonical, "native": native}


class _Kernels:
    """The functions of the arithmetic in use."""

    def __init__(self) -> None:
        self.module: ModuleType = canonical

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


_active = _Kernels()

if TYPE_CHECKING:
    kernels = canonical
else:
    kernels = _active


@contextmanager
def use(arithmetic: str) -> Iterator[None]:
    """Makes ``kernels`` stand for one arithmetic until the block ends.

    Args:
        arithmetic: ``canonical`` or ``native``.

    Raises:
        ValueError: neither.

    Contract: for the whole process, so not from two threads that want different ones; backward
    passes belong into the block of their forward passes.
    """
    if arithmetic not in _MODULES:
        raise ValueError(f"arithmetic: got {arithmetic!r}, expected one of {', '.join(_MODULES)}")
    before = _active.module
    _active.module = _MODULES[arithmetic]
    try:
        yield
    finally:
        _active.module = before
