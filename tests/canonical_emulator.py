"""The CUDA kernels of canonical arithmetic, played lane by lane on the host (tests/emulator/)."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from primitives import _C


@contextmanager
def emulated(library: ctypes.CDLL, seed: int = 0, enough_blocks: int = 1) -> Iterator[None]:
    """In it, ``primitives.canonical`` on CPU tensors runs the CUDA kernels on the emulated device.

    Args:
        library: ``emulators.build("canonical")``.
        seed: of the order in which blocks and threads run.
        enough_blocks: decides how large the tiles of a matrix product are.

    What a device would not survive, or would not do the same way twice, is a RuntimeError.
    """
    library.emulated_kernels.restype = ctypes.c_void_p
    library.set_emulation(ctypes.c_uint32(seed), ctypes.c_int64(enough_blocks))
    _C.emulate_canonical(library.emulated_kernels())
    try:
        yield
    finally:
        _C.emulate_canonical(0)
