"""What this machine lacks for the tests on a GPU, and what it is."""

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


def gpu_description() -> str:
    """One line for people: the GPUs and torch."""
    gpu = torch.cuda.get_device_properties(0)
    return (
        f"{torch.cuda.device_count()} x {gpu.name}, sm_{gpu.major}{gpu.minor}, "
        f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB; "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    )
