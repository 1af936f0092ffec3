"""The one home of environment variables: name, meaning and default of each, and how it is read."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable the project reads."""

    name: str
    default: str
    meaning: str

    def get(self) -> str:
        """The value in the environment, or the default."""
        return os.environ.get(self.name) or self.default


ISA = Variable(
    "PRIMITIVES_ISA",
    "",
    "CPU kernels to use: avx512_bf16, avx512, avx2 or scalar. Default: the best this CPU has; "
    "avx512_bf16 also must pass a test of its instruction. The results are the same bits.",
)
CUDA = Variable("PRIMITIVES_CUDA", "auto", "Build: 0 leaves CUDA kernels out, 1 requires nvcc.")
NVCC = Variable("PRIMITIVES_NVCC", "", "Build: path of the nvcc to use.")
CUDA_ARCHS = Variable("PRIMITIVES_CUDA_ARCHS", "80;90;100", "Build: compute capabilities.")
SHM_DIR = Variable(
    "PRIMITIVES_SHM_DIR", "/dev/shm", "Folder (tmpfs) for the memory that the ranks share."
)
FLIGHT_DIR = Variable(
    "PRIMITIVES_FLIGHT_DIR",
    "",
    "Folder for dumps of the flight recorder, one file a process, when a group fails and on "
    "SIGUSR1. Default: none are written. `testbed flight` reads them.",
)
CHECK = Variable(
    "PRIMITIVES_CHECK",
    "0",
    "1 verifies a digest of every payload between ranks; on one rank is on for its groups. A "
    "difference is a CollectiveError that names both ranks and the bytes.",
)
STAGING = Variable(
    "PRIMITIVES_STAGING",
    "auto",
    "How ranks write results and what their peers copy: cache, stream (around the caches), or "
    "auto, which goes by size and watches what it costs. The results are the same.",
)
CUDA_MEMORY = Variable(
    "PRIMITIVES_CUDA_MEMORY",
    "ipc",
    "How ranks share memory of a device: ipc (cudaMalloc and CUDA IPC) or virtual (the virtual "
    "memory API; peers fetch a file descriptor, so a rank lets processes of its user trace it).",
)
PROPERTY_CASES = Variable(
    "PRIMITIVES_PROPERTY_CASES", "600", "Tests: random collectives that are played in one run."
)
PROOF_CASES = Variable(
    "PRIMITIVES_PROOF_CASES",
    "2",
    "Tests: random configurations of each model family whose conversion is proven in one run.",
)
HOST_ID = Variable(
    "PRIMITIVES_HOST_ID",
    "",
    "Ranks with equal values share memory; others talk over the network. Default: the boot id of "
    "the kernel. To set: one value per container that has a /dev/shm of its own.",
)
