"""What this machine lacks for the tests on a GPU, and what it is."""

import torch

from primitives.devices import missing_gpu

__all__ = ["gpu_description", "missing_gpu"]


def gpu_description() -> str:
    """One line for people: the GPUs and torch."""
    gpu = torch.cuda.get_device_properties(0)
    return (
        f"{torch.cuda.device_count()} x {gpu.name}, sm_{gpu.major}{gpu.minor}, "
        f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB; "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    )
