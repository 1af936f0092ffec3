"""The MLP of a transformer layer."""

from typing import cast

import torch
from torch import Tensor, nn

from scenarios.parallel.layers import ColumnLinear, RowLinear, gelu, gelu_erf
from scenarios.parallel.microbatch import Microbatch


class Mlp(nn.Module):
    """Two projections around a GELU: [T, h] -> [T, h].

    Args:
        name: of the module.
        hidden_size: h.
        ffn_hidden_size: width between the projections.
        bias: whether the projections have one.
        exact_gelu: GELU by erf, not in its tanh form.
        std, output_std: of the initial weights.
        dtype: compute dtype.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        ffn_hidden_size: int,
        bias: bool,
        exact_gelu: bool,
        std: float,
        output_std: float,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.activation = gelu_erf if exact_gelu else gelu
        self.linear_fc1 = ColumnLinear(
            f"{name}.linear_fc1", hidden_size, ffn_hidden_size, std, dtype, bias=bias
        )
        self.linear_fc2 = RowLinear(
            f"{name}.linear_fc2", ffn_hidden_size, hidden_size, output_std, dtype, bias=bias
        )

    def forward(self, x: Tensor, mb: Microbatch) -> Tensor:
        """[T, h] -> [T, h]."""
        return cast(Tensor, self.linear_fc2(self.activation(self.linear_fc1(x, mb)), mb))
