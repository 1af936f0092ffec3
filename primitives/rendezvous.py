"""Who am I: rank and world size from whatever launcher started this process."""

import os
from typing import NamedTuple


class RankInfo(NamedTuple):
    """This process within its job.

    ``job`` is equal on all ranks of one job on one host and different for concurrent jobs.
    """

    rank: int
    world_size: int
    local_rank: int
    job: str


# (rank, world size, local rank, job id candidates); the first complete row wins.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("TORCHELASTIC_RUN_ID", "MASTER_PORT")),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    "MPICH / Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("PMI_ID", "HYDI_CONTROL_FD")),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_JOB_ID",)),
}


def rank_info() -> RankInfo | None:
    """Rank, world size and job from torchrun, mpirun or srun variables; None when there are none.

    Raises:
        ValueError: a launcher's variables are not integers or contradict each other.
    """
    for launcher, (rank_name, world_name, local_name, job_names) in LAUNCHERS.items():
        if rank_name not in os.environ or world_name not in os.environ:
            continue
        try:
            rank, world_size = int(os.environ[rank_name]), int(os.environ[world_name])
            local_rank = int(os.environ.get(local_name, rank))
        except ValueError as error:
            raise ValueError(f"{launcher} variables {rank_name}, {world_name}: {error}") from None
        if not 0 <= rank < world_size:
            raise ValueError(f"{launcher}: {rank_name}={rank} is outside {world_name}={world_size}")
        job = "/".join(os.environ[name] for name in job_names if name in os.environ)
        return RankInfo(rank, world_size, local_rank, f"{launcher}/{job or os.getppid()}")
    return None


def install() -> None:
    pass
