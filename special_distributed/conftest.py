"""Tests of this folder run on exactly four ranks in lockstep."""

from collections.abc import Iterator
from typing import Any

import pytest

from primitives.rendezvous import rank_info

pytest_plugins = ["special_distributed.lockstep"]
NUM_RANKS = 4


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    info = rank_info()
    if info is not None and info.world_size != NUM_RANKS:
        raise pytest.UsageError(f"{NUM_RANKS} ranks are needed, got {info.world_size}")


@pytest.fixture(scope="session")
def mpi() -> Iterator[Any]:
    """mpi4py's module in a job that its MPI started; elsewhere there is no MPI to compare with."""
    info = rank_info()
    if info is None or info.job.startswith("torchrun"):
        pytest.skip("mpirun did not start the ranks of this job: no MPI to compare with")
    from mpi4py import MPI

    if MPI.COMM_WORLD.size != NUM_RANKS:
        pytest.skip(f"MPI.COMM_WORLD has {MPI.COMM_WORLD.size} ranks, this job {NUM_RANKS}")
    assert MPI.COMM_WORLD.rank == info.rank
    yield MPI
    # Collective: at exit it would wait for rank 0, which waits for the others to leave lockstep.
    MPI.Finalize()
