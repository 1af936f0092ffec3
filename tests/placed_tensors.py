"""A device that is none: tensors that say they are elsewhere and hold a CPU tensor.

In ``elsewhere()`` whatever is made on or moved to ``ELSEWHERE`` computes on the CPU, but an
operation on tensors of both devices, or memory read as the host's, is an error, as on CUDA. It
shows that code puts its tensors where they belong; nothing about a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from primitives import arithmetic, canonical

ELSEWHERE = torch.device("meta")  # whose backward passes run on the thread that asks for them


class Placed(Tensor):
    """A tensor elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Placed":
        made: Placed = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=ELSEWHERE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})


def _unwrapped(x: Any) -> Any:
    return x.inner if isinstance(x, Placed) else x


def _wrapped(x: Any) -> Any:
    return Placed(x) if isinstance(x, Tensor) and not isinstance(x, Placed) else x


def _check_together(what: str, arguments: Any) -> bool:
    """Whether the tensors are elsewhere; all must be, but for single numbers."""
    tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
    placed = any(isinstance(x, Placed) for x in tensors)
    if placed and not all(isinstance(x, Placed) or x.dim() == 0 for x in tensors):
        raise RuntimeError(f"{what}: expected all tensors on one device")
    return placed


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    moves = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    placed = (
        isinstance(args[0], Placed) if moves else _check_together(str(function), (args, kwargs))
    )
    if (device := kwargs.get("device")) is not None:
        placed = torch.device(device) == ELSEWHERE
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = function(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
    if function._schema.is_mutable:
        return args[0]
    return tree_map(_wrapped, out) if placed else out


def _kernel(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        placed = _check_together(f"canonical.{name}", (args, kwargs))
        out = function(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        return tree_map(_wrapped, out) if placed else out

    return call


@contextmanager
def elsewhere() -> Iterator[None]:
    """Makes ``ELSEWHERE`` a device for torch and for ``primitives.arithmetic.kernels``."""
    kernels = mock.Mock(spec=canonical)
    for name in canonical.__all__:
        setattr(kernels, name, _kernel(name, getattr(canonical, name)))
    with mock.patch.dict(arithmetic._MODULES, canonical=kernels), _Mode():
        yield
