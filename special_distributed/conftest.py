"""Tests of this folder run on four ranks in lockstep, of a launcher or forked.

A file whose ``RANK_COUNTS`` names other numbers runs on those, too: ``--ranks 8``, ``mpirun -n 8``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from primitives.rendezvous import rank_info

pytest_plugins = ["primitives.lockstep"]
NUM_RANKS = 4
_num_ranks = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    try:
        info = rank_info()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if info is None and config.option.ranks is None:
        config.option.ranks = NUM_RANKS
    num_ranks = config.option.ranks if info is None else info.world_size
    config.stash[_num_ranks] = num_ranks


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    num_ranks = config.stash[_num_ranks]
    for item in items:
        if (here := Path(__file__).parent) not in item.path.parents:
            continue
        allowed = getattr(getattr(item, "module", None), "RANK_COUNTS", (NUM_RANKS,))
        if num_ranks not in allowed:
            needed = " or ".join(map(str, allowed))
            where = item.path.relative_to(here.parent)
            raise pytest.UsageError(f"{where}: {needed} ranks are needed, got {num_ranks}")


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
    # Finalize is collective. At exit it would wait for rank 0, which waits for the others to leave
    # lockstep; and it keeps the GIL, which the thread that tells the others to come here needs: so
    # all meet in a barrier first, which does not.
    MPI.COMM_WORLD.Barrier()
    MPI.Finalize()


@pytest.fixture
def folder(world: Any, rank: int, tmp_path: Path) -> Path:
    """Rank 0's temporary folder, on every rank."""
    import torch.distributed as dist

    shared = [tmp_path if rank == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    assert shared[0] is not None
    return shared[0]
