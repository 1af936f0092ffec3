"""The kernels for a device: those of the CPU, or of CUDA on the current stream."""

from typing import Protocol

import torch
from torch import Tensor

import primitives._C as _C

MODES = ("portable", "device")
"""How exp is computed on CUDA; the CPU has one way."""


class Kernels(Protocol):
    """What is documented in csrc/vocab_entropy/kernels.hpp, on tensors of one device."""

    def forward(
        self, logits: Tensor, labels: Tensor | None, ignored: int, first: int,
        segment_length: int, num_segments: int, scale: float, quads: Tensor, /,
    ) -> None:  # fmt: skip
        """Logits [tokens, columns] of this rank to quads [tokens, 4]."""

    def finish(
        self, shards: Tensor, labels: Tensor | None, ignored: int, scale: float, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quads of all ranks [ranks, tokens, 4] to quads, entropy, log_prob, log_sum_exp."""

    def backward(
        self, logits: Tensor, labels: Tensor | None, ignored: int, first: int, scale: float,
        quads: Tensor, by_entropy: Tensor | None, by_log_prob: Tensor | None,
        by_log_sum_exp: Tensor | None, out: Tensor, /,
    ) -> None:  # fmt: skip
        """The gradient into ``out``, which may be the logits."""


class CpuKernels:
    """On the calling thread and as many others as torch uses."""

    forward = staticmethod(_C.vocab_entropy_forward)
    finish = staticmethod(_C.vocab_entropy_finish)
    backward = staticmethod(_C.vocab_entropy_backward)


class CudaKernels:
    """Enqueued on the stream that is current when this is made."""

    def __init__(self, device: torch.device, mode: str) -> None:
        self._device_exp = mode == "device"
        self._stream = torch.cuda.current_stream(device).cuda_stream

    def forward(
        self, logits: Tensor, labels: Tensor | None, ignored: int, first: int,
        segment_length: int, num_segments: int, scale: float, quads: Tensor, /,
    ) -> None:  # fmt: skip
        """See ``Kernels``."""
        _C.vocab_entropy_cuda_forward(
            logits, labels, ignored, first, segment_length, num_segments, scale, quads,
            self._device_exp, self._stream,
        )  # fmt: skip

    def finish(
        self, shards: Tensor, labels: Tensor | None, ignored: int, scale: float, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See ``Kernels``."""
        return _C.vocab_entropy_cuda_finish(shards, labels, ignored, scale, self._stream)

    def backward(
        self, logits: Tensor, labels: Tensor | None, ignored: int, first: int, scale: float,
        quads: Tensor, by_entropy: Tensor | None, by_log_prob: Tensor | None,
        by_log_sum_exp: Tensor | None, out: Tensor, /,
    ) -> None:  # fmt: skip
        """See ``Kernels``."""
        _C.vocab_entropy_cuda_backward(
            logits, labels, ignored, first, scale, quads, by_entropy, by_log_prob, by_log_sum_exp,
            out, self._device_exp, self._stream,
        )  # fmt: skip


def kernels_for(device: torch.device, mode: str) -> Kernels:
    """The kernels for tensors on ``device``.

    Raises:
        ValueError: there are none, or there is no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if device.type == "cpu":
        return CpuKernels()
    if device.type != "cuda":
        raise ValueError(f"logits: expected a CPU or CUDA tensor, got one on {device}")
    if not _C.cuda_built:
        raise ValueError(
            f"logits: they are on {device}, but this build of primitives has no CUDA kernels "
            "(there was no nvcc); build it again where nvcc is found, PRIMITIVES_CUDA=1 insists"
        )
    return CudaKernels(device, mode)
