"""Which model a scenario's family is."""

import torch

from scenarios.models.bert import Bert
from scenarios.models.gpt import Gpt
from scenarios.schema import Scenario

Model = Gpt | Bert


def make_model(scenario: Scenario, dtype: torch.dtype) -> Model:
    """The model of a scenario, its parameters empty.

    Args:
        scenario: its family and sizes are used.
        dtype: of weights and activations.
    Raises:
        ValueError: a family that has no model here.
    """
    match scenario.family:
        case "gpt":
            return Gpt(scenario.model, dtype)
        case "bert":
            return Bert(scenario.model, dtype)
    raise ValueError(f"the builtin engine trains the families gpt and bert; got {scenario.family}")
