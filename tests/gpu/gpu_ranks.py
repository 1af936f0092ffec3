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


@cache
def library() -> ctypes.CDLL:
    """Built on first use, for the GPU of this machine (a minute or two)."""
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    sources = [Path(__file__).parent / "rank_streams.cu", ROOT / "csrc/collectives/cuda/launch.cu"]
    flags = ["-O3", "-std=c++17", "-fmad=false", "-arch=native", "-shared", "-Xcompiler", "-fPIC"]
    command = [NVCC, *flags, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(LIBRARY)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return ctypes.CDLL(str(LIBRARY))


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
