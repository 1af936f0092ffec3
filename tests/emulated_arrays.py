"""Arrays of other libraries on the emulated device: DLPack of today and of before 1.0, and CUDA
array interface."""

import ctypes
from types import ModuleType
from typing import Any

import numpy as np
import torch

CUDA = 2
"""kDLCUDA."""
DEVICE_AT = {"dltensor": 8, "dltensor_versioned": 40}
"""Offset of the DLDevice in a DLManagedTensor and a DLManagedTensorVersioned."""
READ_ONLY_AT = 24


class Array:
    """NumPy's memory as if on the device; ``streams``: what was asked for."""

    def __init__(self, array: np.ndarray, device: ModuleType, readonly: bool = False) -> None:
        self.array, self.device, self.readonly = array, device, readonly
        self.streams: list[int | None] = []

    def get(self) -> np.ndarray:
        """A copy on the host, as CuPy's."""
        self.device.synchronize()
        return self.array.copy()

    def capsule(self, name: str, **options: Any) -> Any:
        """Of the CPU's memory, with the device changed."""
        made = torch.from_numpy(self.array).__dlpack__(**options)
        of = ctypes.pythonapi.PyCapsule_GetPointer
        of.restype, of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        at = of(made, name.encode())
        ctypes.c_int32.from_address(at + DEVICE_AT[name]).value = CUDA
        if self.readonly:
            ctypes.c_uint64.from_address(at + READ_ONLY_AT).value |= 1
        return made


class Versioned(Array):
    """DLPack 1.0, as CuPy 14."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int] | None = None) -> Any:
        assert max_version is not None
        self.streams.append(stream)
        return self.capsule("dltensor_versioned", max_version=max_version)


class Old(Array):
    """DLPack of before 1.0."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, stream: int | None = None) -> Any:
        self.streams.append(stream)
        return self.capsule("dltensor")


class Interface(Array):
    """The CUDA array interface alone, as Numba."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, self.readonly),
            "strides": None if self.array.flags.c_contiguous else self.array.strides,
            "version": 3,
            "stream": self.device.stream(),
        }
