"""The states of this process's random generators as a checkpointable dict."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of torch's CPU, torch's current CUDA device, numpy's and Python's generators.

    Returns:
        Nested dict of tensors (copies) and plain values; "cuda" is there where CUDA is.
    """
    version, (*words, position), gauss = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "numpy": {
            "generator": numpy_state["bit_generator"],
            "words": torch.from_numpy(numpy_state["state"]["key"].copy()),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "python": {
            "version": version,
            "words": torch.tensor(words, dtype=torch.uint32),
            "position": position,
            "gauss": gauss,
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts all generators back into a state that ``random_state`` gave."""
    torch.set_rng_state(state["cpu"])
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": numpy_state["generator"],
            "state": {"key": numpy_state["words"].numpy(), "pos": numpy_state["position"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    python = state["python"]
    words = (*python["words"].tolist(), python["position"])
    random.setstate((python["version"], words, python["gauss"]))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def reseed(state: dict[str, Any], rank: int, world_size: int) -> None:
    """Seeds all generators from a state that ``random_state`` gave, for another number of ranks.

    Every rank of every world size gets streams of its own; the same arguments give the same ones.
    """
    positions = f"{state['numpy']['position']}, {state['python']['position']}"
    digest = hashlib.sha256(f"rank {rank} of {world_size} at {positions}".encode())
    for part in (state["cpu"], state["numpy"]["words"], state["python"]["words"]):
        digest.update(part.view(torch.uint8).numpy().tobytes())
    seed = digest.digest()
    torch.manual_seed(int.from_bytes(seed[:8], "little") >> 1)
    np.random.seed(np.frombuffer(seed, np.uint32))
    random.seed(seed)
