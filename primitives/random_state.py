"""The states of this process's random generators as a checkpointable dict."""

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
