"""Which device a rank works on."""

import torch

from primitives import _C


def missing_gpu() -> str | None:
    """Why nothing can run on a GPU here; None if it can."""
    if not _C.cuda_built:
        return "this build of primitives has no CUDA kernels (there was no nvcc)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable GPU"
    return None


def cuda_device(local_rank: int) -> torch.device:
    """The GPU of a rank, made the current one: with fewer GPUs than ranks they share.

    Raises:
        ValueError: there is no GPU.
    """
    if reason := missing_gpu():
        raise ValueError(f"device: expected cuda to be usable, but {reason}")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
