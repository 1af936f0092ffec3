"""The Communicator on CUDA memory: torch tensors and CuPy arrays, four processes, one GPU."""

import importlib.util
from pathlib import Path

import pytest
from ranks import ProcessRanks

NUM_RANKS = 4


def passes(folder: Path, name: str) -> None:
    target = f"gpu.gpu_communicator_ranks:{name}"
    results = ProcessRanks(target, NUM_RANKS, folder, fresh=True).start().wait(600)
    assert [code for code, _ in results] == [0] * NUM_RANKS, "\n".join(out for _, out in results)


@pytest.mark.timeout(700)
def test_torch_tensors(tmp_path: Path) -> None:
    passes(tmp_path, "torch_tensors")


@pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None,
    reason='CuPy is not installed (pip install "collective-testbed[gpu]")',
)
@pytest.mark.timeout(700)
def test_cupy_arrays_and_an_independent_kernel(tmp_path: Path) -> None:
    passes(tmp_path, "cupy_arrays")
