"""The mixture of experts in the place of an MLP: router, routed experts, shared expert."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from primitives.arithmetic import kernels
from scenarios.models.mlp import Mlp
from scenarios.moe_config import MoeConfig
from scenarios.parallel.experts import RoutedExperts
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.router import Router


class _Fork(Function):
    """One tensor for several consumers, whose gradients are added in one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_branches: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(num_branches))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = kernels.tree_sum(torch.stack(gradients), out_dtype=gradients[0].dtype)
        return total, None


_fork: Callable[..., tuple[Tensor, ...]] = _Fork.apply


class MoeMlp(nn.Module):
    """sum over a token's experts of prob * expert(x), + shared expert(x); no bias, GELU by erf.

    Args:
        name: of the module.
        layer: number of the layer.
        hidden_size: h.
        config: the experts.
        std, output_std: of the initial weights.
        dtype: compute dtype.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        hidden_size: int,
        config: MoeConfig,
        std: float,
        output_std: float,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.router = Router(
            f"{name}.router",
            layer,
            hidden_size,
            config.num_experts,
            config.router_topk,
            config.aux_loss_coeff,
            std,
            dtype,
        )
        self.experts = RoutedExperts(
            f"{name}.experts",
            hidden_size,
            config.ffn_hidden_size,
            config.num_experts,
            std,
            output_std,
            dtype,
        )
        width = config.shared_expert_intermediate_size
        self.shared_experts = None
        if width is not None:
            self.shared_experts = Mlp(
                f"{name}.shared_experts", hidden_size, width, False, True, std, output_std, dtype
            )

    def forward(self, x: Tensor, mb: Microbatch) -> Tensor:
        """[T, h] -> [T, h]."""
        if self.shared_experts is None:
            x_router, x_experts = _fork(x, 2)
        else:
            x_router, x_experts, x_shared = _fork(x, 3)
        probs, chosen = self.router(x_router, mb)
        y = cast(Tensor, self.experts(x_experts, probs, chosen, mb))
        return y if self.shared_experts is None else y + self.shared_experts(x_shared, mb)
