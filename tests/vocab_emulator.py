"""The CUDA kernels of the vocabulary entropy, played lane by lane on the host (tests/emulator/)."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of canonical::Dtype."""
MODES = ("portable", "device")
FLAGS = ["-std=c++20", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
FLAGS += ["-U_FORTIFY_SOURCE"]  # with it longjmp takes a jump between stacks for an attack


def build(csrc: Path = ROOT / "csrc", optimize: bool = True) -> ctypes.CDLL:
    """Compiles the kernels in ``csrc`` for the emulated device, unless that was done before."""
    tests = ROOT / "tests"
    flags = [*FLAGS, "-O1" if optimize else "-O0"]
    sources = [*csrc.glob("canonical/*.hpp"), *csrc.glob("vocab_entropy/*.hpp")]
    sources += (tests / "emulator").glob("*")
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted(sources, key=lambda path: path.name):
        digest.update(source.read_bytes())
    library = ROOT / "build" / "emulator" / f"vocab_entropy-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [os.environ.get("CXX", "g++"), *flags, f"-I{csrc}", f"-I{tests}"]
            command += [str(tests / "emulator" / "vocab_entropy.cpp"), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            made.rename(library)
    return ctypes.CDLL(str(library))


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
    """``primitives.vocab_parallel.kernels`` on the emulated device."""

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
