"""The CUDA collectives on one GPU, each rank a stream: played as emulated_ranks plays them."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import emulated_ranks
from emulated_ranks import Arrays, Failure, Machine, RankCall

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARY = ROOT / "build" / "gpu" / "rank_streams.so"
NVCC = os.environ.get("PRIMITIVES_NVCC", "/usr/local/cuda/bin/nvcc")


def build(arch: str, to: Path) -> ctypes.CDLL:
    """Compiles it for an architecture of nvcc (a minute or two)."""
    to.parent.mkdir(parents=True, exist_ok=True)
    sources = [Path(__file__).parent / "rank_streams.cu", ROOT / "csrc/collectives/cuda/launch.cu"]
    flags = ["-O3", "-std=c++17", "-fmad=false", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC"]
    command = [NVCC, *flags, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(to)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return ctypes.CDLL(str(to), mode=os.RTLD_NOW)


@cache
def library() -> ctypes.CDLL:
    """Built on first use, for the GPU of this machine."""
    return build("native", LIBRARY)


def _run(machine: Machine, arrays: Arrays, report: "ctypes.Array[ctypes.c_char]") -> int:
    code: int = library().play_on_gpu(
        arrays.num_calls,
        machine.dead_rank,
        machine.dead_from,
        arrays.ranks,
        arrays.calls,
        arrays.regions,
        len(arrays.regions),
        report,
        len(report),
    )
    return code


def play(
    machine: Machine, calls: Sequence[Sequence[RankCall]], aborting: Sequence[int] = ()
) -> list[Failure | None]:
    """As emulated_ranks.play; lanes, room, seed and mistakes of ``machine`` mean nothing here."""
    return emulated_ranks.play(machine, calls, aborting, run=_run)
