"""How a benchmark measures on a device: time, memory beyond its inputs, and the limit of copies."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from primitives import _C

LIMITS = {"read": 1, "read + write": 2}
"""Name of each limit, and how many times it moves the logits."""


class Device(Protocol):
    """Where a benchmark runs."""

    device: torch.device

    def stamp(self) -> object:
        """A moment, when what was asked for before is done."""

    def ms(self, start: object, end: object) -> float:
        """Milliseconds between two stamps."""

    def extra_nbytes(self, work: Callable[[], object]) -> int | None:
        """How much memory ``work`` had at most beyond what there was; None if that is not told."""

    def limits_ms(self, fresh: Callable[[], Tensor]) -> dict[str, float]:
        """How long it takes to read a tensor, and to read and write as much: by LIMITS.

        Args:
            fresh: writes the tensor, and returns it.
        """


class Cpu:
    """One thread, the clock of the process, its resident set."""

    device = torch.device("cpu")

    def stamp(self) -> object:
        """Seconds."""
        return time.perf_counter()

    def ms(self, start: object, end: object) -> float:
        """See ``Device``."""
        assert isinstance(start, float)
        assert isinstance(end, float)
        return 1e3 * (end - start)

    def extra_nbytes(self, work: Callable[[], object]) -> int | None:
        """How much the resident set grew at most."""
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        except OSError:
            return None
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)

    def limits_ms(self, fresh: Callable[[], Tensor]) -> dict[str, float]:
        """By loops that do nothing else; the faster of with and without software prefetch.

        Reading comes just after writing, and reading and writing after that, as forward and
        backward do: what the caches still have to write back counts on both sides.
        """
        loops = dict(zip(LIMITS, (_C.read_words, _C.flip_words), strict=True))
        best = dict.fromkeys(LIMITS, float("inf"))
        for prefetch in (False, True):
            words = fresh().view(-1).view(torch.uint8)
            words = words[: words.numel() // 1024 * 1024]
            for limit, loop in loops.items():
                start = self.stamp()
                loop(words, prefetch)
                best[limit] = min(best[limit], self.ms(start, self.stamp()))
        return best


class Cuda:
    """The current GPU: CUDA events, torch's caching allocator.

    Raises:
        ValueError: there is no usable GPU, or this build has no CUDA kernels.
    """

    def __init__(self) -> None:
        if not _C.cuda_built:
            raise ValueError("--device cuda: this build of primitives has no CUDA kernels")
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no usable GPU")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._copy: Tensor | None = None

    def stamp(self) -> object:
        """A recorded event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def ms(self, start: object, end: object) -> float:
        """Waits for the end."""
        assert isinstance(start, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return float(start.elapsed_time(end))

    def extra_nbytes(self, work: Callable[[], object]) -> int | None:
        """The growth of the peak of what is allocated."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def limits_ms(self, fresh: Callable[[], Tensor]) -> dict[str, float]:
        """The device's own copy, the median of 5: reading takes half of its time."""
        memory = fresh()
        if (
            self._copy is None
            or self._copy.shape != memory.shape
            or self._copy.dtype != memory.dtype
        ):
            self._copy = torch.empty_like(memory)
        times = []
        for _ in range(5):
            start = self.stamp()
            self._copy.copy_(memory)
            times.append(self.ms(start, self.stamp()))
        copy_ms = statistics.median(times)
        return {"read": copy_ms / 2, "read + write": copy_ms}


def device_named(name: str) -> Device:
    """Of ``--device``."""
    return Cuda() if name == "cuda" else Cpu()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
