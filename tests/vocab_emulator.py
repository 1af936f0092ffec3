"""The CUDA kernels of the vocabulary entropy, played lane by lane on the host (tests/emulator/)."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of canonical::Dtype."""
MODES = ("portable", "device")


class _Play(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint32),
        ("mode", ctypes.c_int32),
        ("enough_blocks", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
    )


class _Logits(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("segment_length", ctypes.c_int64),
        ("num_segments", ctypes.c_int64),
        ("scale", ctypes.c_double),
    )


class EmulatorError(Exception):
    """A kernel did what a device would not survive, or not the same way twice."""


@dataclass(frozen=True)
class Emulator:
    """``vocab_cases.Kernels`` on the emulated device."""

    library: ctypes.CDLL
    mode: str = "portable"
    enough_blocks: int = 1024
    """How many blocks of threads are enough: decides into how many parts a row is cut."""
    seed: int = 0
    """Of the order in which blocks and threads run."""

    def forward(
        self, logits: Tensor, labels: Tensor | None, ignored: int, first: int,
        segment_length: int, num_segments: int, scale: float, quads: Tensor,
    ) -> None:  # fmt: skip
        """As the kernel of the CPU."""
        of = _logits(logits, scale, segment_length, num_segments)
        self._call(
            self.library.emulate_forward, len(logits), ctypes.byref(of), _pointer(labels),
            ctypes.c_int64(ignored), ctypes.c_int64(first), _pointer(quads),
        )  # fmt: skip

    def finish(
        self, shards: Tensor, labels: Tensor | None, ignored: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the kernel of the CPU."""
        num_ranks, num_tokens, _ = shards.shape
        quads, results = torch.empty(num_tokens, 4), torch.empty(3, num_tokens)
        self._call(
            self.library.emulate_finish, num_tokens, _pointer(shards),
            ctypes.c_int64(shards.stride(0)), num_ranks, _pointer(labels), ctypes.c_int64(ignored),
            ctypes.c_double(scale), _pointer(quads), _pointer(results),
        )  # fmt: skip
        return quads, results[0], results[1], results[2]

    def backward(
        self, logits: Tensor, labels: Tensor | None, ignored: int, first: int, scale: float,
        quads: Tensor, by_entropy: Tensor | None, by_log_prob: Tensor | None,
        by_log_sum_exp: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """As the kernel of the CPU."""
        of = _logits(logits, scale, 1, 1)
        self._call(
            self.library.emulate_backward, len(logits), ctypes.byref(of), _pointer(labels),
            ctypes.c_int64(ignored), ctypes.c_int64(first), _pointer(quads), _pointer(by_entropy),
            _pointer(by_log_prob), _pointer(by_log_sum_exp), _pointer(out),
            ctypes.c_int64(out.stride(0)),
        )  # fmt: skip

    def _call(
        self, function: "ctypes._NamedFuncPointer", num_tokens: int, *arguments: object
    ) -> None:
        play = _Play(self.seed, MODES.index(self.mode), self.enough_blocks, num_tokens)
        error = ctypes.create_string_buffer(256)
        if function(ctypes.byref(play), *arguments, error, len(error)):
            raise EmulatorError(error.value.decode())


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _logits(x: Tensor, scale: float, segment_length: int, num_segments: int) -> _Logits:
    assert x.shape[1] <= 1 or x.stride(1) == 1
    dtype = DTYPES.index(x.dtype)
    return _Logits(
        x.data_ptr(), dtype, x.stride(0), x.shape[1], segment_length, num_segments, scale
    )
