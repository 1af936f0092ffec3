"""What stands in a model of megatron-core where the source has another head, or none."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from scenarios.convert.megatron import TokenClassificationHead


class LabelHead(nn.Linear):
    """Dropout and a linear layer with a bias, in place of ``output_layer``."""

    def __init__(self, hidden_size: int, head: TokenClassificationHead) -> None:
        super().__init__(hidden_size, head.num_labels)
        self.dropout = head.dropout

    def forward(self, states: Tensor, **_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """[tokens, sequences, hidden] -> [tokens, sequences, labels], and no bias to add."""
        return super().forward(F.dropout(states, self.dropout, self.training)), None


class StatesForLogits(nn.Module):
    """In place of ``output_layer``: the states are the output."""

    def forward(self, states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """The states, and no bias to add."""
        return states, None


class AsTheyAre(nn.Module):
    """In place of BertModel's ``lm_head`` or ``binary_head``: what goes in comes out."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The same."""
        return hidden_states
