"""Routed experts: each token's row through its experts, and the weighted sum of what comes back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from primitives.arithmetic import kernels
from scenarios.parallel.dispatch import Dispatch
from scenarios.parallel.layers import Layer
from scenarios.parallel.mesh import Mesh
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.parameters import ParameterSpec, column_spec, row_spec


class ExpertWeights(Layer):
    """One projection of all experts of a layer; weight e belongs to expert e."""

    def __init__(self, specs: list[ParameterSpec], dtype: torch.dtype):
        super().__init__([replace(spec, expert=True) for spec in specs], dtype)

    def allocate(self, mesh: Mesh) -> None:
        """Makes this rank's part: its run of the experts, cut over etp."""
        per_rank = len(self.specs) // mesh.ep.num_ranks
        first = mesh.ep.rank * per_rank
        self.specs = self.specs[first : first + per_rank]
        super().allocate(mesh)

    def forward(self) -> list[Tensor]:
        """The weights of this rank's experts; calling fires the hook that waits for them."""
        return [self.get_parameter(spec.name.rpartition(".")[2]) for spec in self.specs]


class _RoutedExperts(Function):
    """All products of one expert, and of one microbatch where tokens are summed, stay apart.

    An expert is two projections around a GELU by erf, on this rank's parts of its width f.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probs: Tensor,
        dispatch: Dispatch,
        module: "RoutedExperts",
        mb: Microbatch,
    ) -> Tensor:
        weights = [*zip(module.linear_fc1(), module.linear_fc2(), strict=True)]
        by_slot = x[:, None].expand(-1, probs.shape[1], -1)
        rows = dispatch.to_experts(dispatch.to_slots(by_slot))
        hidden, partials = [], []
        for span, (fc1, fc2) in zip(dispatch.spans, weights, strict=True):
            before = kernels.gemm(rows[span], fc1, transpose_b=True, out_dtype=x.dtype)
            parts = kernels.gemm(kernels.gelu_erf(before), fc2, transpose_b=True)
            hidden.append(before)  # [parts, n, f / C]
            partials.append(kernels.tree_sum(parts))  # [n, h]
        outputs = dispatch.from_slots(dispatch.from_experts(torch.cat(partials), x.dtype))
        ctx.save_for_backward(probs, rows, outputs)
        ctx.dispatch, ctx.module, ctx.mb = dispatch, module, mb
        ctx.weights, ctx.hidden = weights, hidden
        return kernels.tree_sum(probs[:, :, None] * outputs.float(), 1, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        probs, rows, outputs = ctx.saved_tensors
        dispatch: Dispatch = ctx.dispatch
        dout_wide = dout.float()[:, None]  # [T, 1, h]
        dprobs = kernels.row_sum(dout_wide * outputs.float())
        by_slot = (probs[:, :, None] * dout_wide).to(dout.dtype)
        dy = dispatch.to_experts(dispatch.to_slots(by_slot))
        dhidden, partials = [], []
        for span, before, (fc1, fc2) in zip(dispatch.spans, ctx.hidden, ctx.weights, strict=True):
            dact = kernels.gemm(dy[span], fc2, out_dtype=dy.dtype)
            dbefore = kernels.gelu_erf_backward(dact, before)
            dhidden.append(dbefore)
            partials.append(kernels.tree_sum(kernels.gemm(dbefore, fc1)))
        _push_weight_gradients(ctx, rows, dy, dhidden)
        dx = dispatch.from_slots(dispatch.from_experts(torch.cat(partials), dout.dtype))
        return kernels.tree_sum(dx, 1, out_dtype=dout.dtype), dprobs, None, None, None


_routed_experts: Callable[..., Tensor] = _RoutedExperts.apply


def _push_weight_gradients(ctx: Any, rows: Tensor, dy: Tensor, dhidden: list[Tensor]) -> None:
    """One gemm per (microbatch, expert, part); an expert without tokens has a gradient of zeros."""
    fc1, fc2 = ctx.module.linear_fc1.specs, ctx.module.linear_fc2.specs
    for run in ctx.dispatch.runs:
        start = ctx.dispatch.spans[run.expert].start
        local = slice(run.rows.start - start, run.rows.stop - start)
        act = kernels.gelu_erf(ctx.hidden[run.expert][:, local].contiguous())
        dfc2 = kernels.gemm(dy[run.rows], act, transpose_a=True)
        ctx.mb.gradients.push(fc2[run.expert].name, run.microbatch, dfc2)
        dfc1 = kernels.gemm(dhidden[run.expert][:, local], rows[run.rows], transpose_a=True)
        ctx.mb.gradients.push(fc1[run.expert].name, run.microbatch, dfc1)


class RoutedExperts(nn.Module):
    """This rank's experts of one layer and the dispatch to all of them.

    Args:
        name: of the module.
        hidden_size, ffn_hidden_size: widths.
        num_experts: over all ranks.
        std, output_std: of the initial weights.
        dtype: compute dtype.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        ffn_hidden_size: int,
        num_experts: int,
        std: float,
        output_std: float,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.num_experts = num_experts
        fc1, fc2 = (
            [f"{name}.{projection}.weight{e}" for e in range(num_experts)]
            for projection in ("linear_fc1", "linear_fc2")
        )
        self.linear_fc1 = ExpertWeights(
            [column_spec(one, (ffn_hidden_size, hidden_size), init_std=std) for one in fc1], dtype
        )  # [parts, f / C, h] each
        self.linear_fc2 = ExpertWeights(
            [row_spec(one, hidden_size, ffn_hidden_size, init_std=output_std) for one in fc2], dtype
        )  # [parts, h, f / C] each

    def forward(self, x: Tensor, probs: Tensor, experts: Tensor, mb: Microbatch) -> Tensor:
        """sum over a token's experts of prob * expert(x): -> [T, h].

        Args:
            x: [T, h].
            probs: [T, k] fp32.
            experts: [T, k] int64.
            mb: the microbatch of these tokens.

        Numerics: an expert's output is rounded once, after the tree over the parts of its width;
        weighted sum in fp32 by the tree over a token's choices, then one rounding.
        """
        dispatch = Dispatch(experts, self.num_experts, mb.index, mb.mesh)
        return _routed_experts(x, probs, dispatch, self, mb)
