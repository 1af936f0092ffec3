"""Model families by name: the one place that knows them all."""

from collections.abc import Callable

import torch

from scenarios.models.bert import Bert
from scenarios.models.gpt import Gpt
from scenarios.models.model import Model
from scenarios.parallel.mesh import Mesh, Stage
from scenarios.scenario import ModelConfig, Scenario

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

FAMILIES: dict[str, Callable[[ModelConfig, torch.dtype, Stage], Model]] = {
    "gpt": Gpt,
    "moe": Gpt,
    "bert": Bert,
}


def compute_dtype(scenario: Scenario) -> torch.dtype:
    """The dtype of weights and activations."""
    return DTYPES[scenario.model.precision]


def make_model(scenario: Scenario, mesh: Mesh, device: torch.device = CPU) -> Model:
    """This rank's part of a scenario's model, on a device.

    Raises:
        ValueError: an unknown family, or sizes that do not divide into canonical parts.
    """
    if scenario.family not in FAMILIES:
        raise ValueError(f"family: got {scenario.family}, expected one of {', '.join(FAMILIES)}")
    model = FAMILIES[scenario.family](scenario.model, compute_dtype(scenario), mesh.stage)
    model.allocate(mesh)
    return model.to(device)
