"""The router of a mixture of experts: top-k of fp32 logits, and the load-balancing loss.

Shapes: T tokens of this rank (a run of a microbatch's tokens), E experts, k experts of a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from primitives.arithmetic import kernels
from primitives.layout import NUM_PARTS
from scenarios.layout import Layout
from scenarios.parallel.layers import Layer
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.parameters import ParameterSpec


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each token and the softmax over them.

    Args:
        logits: [T, E] fp32.
        k: at least 1.

    Returns:
        experts [T, k] int64, the largest first; of equal logits the lower expert comes first.
        probs [T, k] fp32.

    Numerics: ``softmax`` of the k values.
    """
    values, experts = torch.sort(logits, dim=-1, descending=True, stable=True)
    return experts[:, :k].contiguous(), kernels.softmax(values[:, :k].contiguous())


class _Route(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, router: "Router", mb: Microbatch
    ) -> tuple[Tensor, Tensor]:
        logits = kernels.gemm(x, weight, transpose_b=True)  # [T, E]
        experts, probs = top_k(logits, router.topk)
        scores = kernels.softmax(logits)
        counts, aux_loss = router.balance(experts, scores, mb)
        mb.aux_losses[router.layer] = aux_loss
        ctx.save_for_backward(x, weight, experts, probs, scores, counts)
        ctx.router, ctx.mb = router, mb
        ctx.mark_non_differentiable(experts)
        return probs, experts

    @staticmethod
    def backward(ctx: Any, dprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, experts, probs, scores, counts = ctx.saved_tensors
        router, mb = ctx.router, ctx.mb
        # The aux loss joins here, weighted like a loss that is the mean over microbatches.
        slope = router.balance_factor(mb) * router.aux_loss_coeff * mb.loss_weight
        dscores = (counts * counts.new_full((), slope)).expand_as(scores).contiguous()
        dlogits = kernels.softmax_backward(dscores, scores)
        # A choice has one expert once: no sum here has an order.
        chosen = dlogits.gather(1, experts) + kernels.softmax_backward(dprobs, probs)
        dlogits.scatter_(1, experts, chosen)
        by_block = [value.view(mb.num_token_blocks, -1, value.shape[1]) for value in (dlogits, x)]
        dweight = kernels.gemm(*by_block, transpose_a=True)  # [token blocks, E, h]
        mb.gradients.push(router.weight_name, mb.index, dweight)
        return kernels.gemm(dlogits, weight, out_dtype=x.dtype), None, None, None


_route: Callable[..., tuple[Tensor, Tensor]] = _Route.apply


def mean_aux_loss(losses: Tensor, layout: Layout) -> float:
    """What is logged as aux loss: the mean over layers and microbatches, without the coefficient.

    Args:
        losses: [ranks, microbatches of a replica, layers of a stage] fp32.
        layout: of the ranks.

    Numerics: tree over microbatches, then tree over layers.
    """
    by_axis = losses.view(layout.pp, layout.dp, layout.tp, *losses.shape[1:])[:, :, 0]
    by_layer = by_axis.permute(1, 2, 0, 3).reshape(layout.dp * losses.shape[1], -1).contiguous()
    total = kernels.tree_sum(kernels.tree_sum(by_layer))
    return (total / torch.tensor(float(by_layer.numel()))).item()


class Router(Layer):
    """Chooses each token's experts; its weight [E, h] has one gradient partial per token block.

    Args:
        name: of the module.
        layer: number of the layer, for the aux loss.
        hidden_size: h.
        num_experts: E.
        topk: experts of a token.
        aux_loss_coeff: weight of the load-balancing loss; only the gradient knows it.
        std: of the initial weights.
        dtype: the compute dtype of the weight; logits are fp32.
    """

    def __init__(
        self,
        name: str,
        layer: int,
        hidden_size: int,
        num_experts: int,
        topk: int,
        aux_loss_coeff: float,
        std: float,
        dtype: torch.dtype,
    ):
        self.weight_name = f"{name}.weight"
        spec = ParameterSpec(
            self.weight_name,
            (num_experts, hidden_size),
            1,
            (self.weight_name,),
            partials_per_gradient=NUM_PARTS,
            init_std=std,
            sums_tokens=True,
        )
        super().__init__([spec], dtype)
        self.layer = layer
        self.num_experts = num_experts
        self.topk = topk
        self.aux_loss_coeff = aux_loss_coeff

    def forward(self, x: Tensor, mb: Microbatch) -> tuple[Tensor, Tensor]:
        """[T, h] -> probs [T, k] fp32 and experts [T, k] int64, as ``top_k`` gives them."""
        return _route(x, self.weight, self, mb)

    def balance_factor(self, mb: Microbatch) -> float:
        """E / (k * tokens^2), which makes the loss 1 when all experts get equal shares."""
        return self.num_experts / (self.topk * mb.tokens.numel() ** 2)

    def balance(self, experts: Tensor, scores: Tensor, mb: Microbatch) -> tuple[Tensor, Tensor]:
        """The load-balancing loss of one layer and one whole microbatch.

        Args:
            experts: [T, k] of this rank.
            scores: [T, E] fp32 of this rank, the softmax over all experts.
            mb: with sp, its tp ranks each bring their tokens.

        Returns:
            counts [E] fp32, tokens of each expert; loss [] fp32, without the coefficient.

        Numerics: tree over experts of counts * tree over tokens of scores, times the factor.
        Source: Fedus et al., "Switch Transformers", JMLR 2022, equation 4; Megatron-LM's
        switch_load_balancing_loss_func.
        """
        counts = torch.bincount(experts.flatten(), minlength=self.num_experts).float()
        sums = kernels.token_block_sum(scores, mb.num_token_blocks)
        gathered = mb.mesh.gather_tokens(torch.cat((counts[None], sums))[None])
        counts = gathered[:, 0].sum(dim=0)  # whole numbers: any order is exact
        sums = gathered[:, 1:].reshape(NUM_PARTS, self.num_experts).contiguous()
        total = kernels.row_sum(counts * kernels.tree_sum(sums))
        return counts, total * total.new_full((), self.balance_factor(mb))
