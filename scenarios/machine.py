"""Which machine this is, by the names that Megatron-LM's golden files have."""

from pathlib import Path

GPUS = Path("/proc/driver/nvidia/gpus")
KEYS = {
    "A100": "lts_dgx_a100",
    "H100": "dev_dgx_h100",
    "H200": "dev_dgx_h200",
    "GB200": "dev_dgx_gb200",
}
"""GPU model -> ``environment_platform``: the environment in which Megatron-LM tests on it."""
ANY_MACHINE = "lts"
"""Machines without one of these GPUs; its goldens also serve a machine that has none of its own."""


def machine_key(gpus: Path = GPUS) -> str:
    """What follows ``golden_values_`` in the name of a native golden of this machine.

    Args:
        gpus: where the NVIDIA driver lists its GPUs, a folder each with a file ``information``.
    """
    for information in sorted(gpus.glob("*/information")):
        words = information.read_text(errors="replace").replace("-", " ").split()
        for model, key in KEYS.items():
            if model in words:
                return key
    return ANY_MACHINE
