"""Megatron-style layers in canonical arithmetic.

Shapes: C canonical parts of which this rank holds a run ("parts"), T tokens of one microbatch, L
local tokens (T, or T / tp with sequence parallelism), h hidden. Activations are in the compute
dtype; every sum is made in fp32 and rounded once. A layer's backward hands its weight gradient,
fp32 and per microbatch, to ``microbatch.gradients``; autograd only carries activations, and no
tensor has more than two consumers, so autograd's own additions have one order.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from primitives.arithmetic import kernels
from scenarios.parallel.mesh import Mesh
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.parameters import (
    ParameterSpec,
    column_spec,
    row_spec,
    token_spec,
)


class Layer(nn.Module):
    """A module whose parameters are declared by ``ParameterSpec``s and filled by the optimizer.

    The parameters exist after ``allocate``, which also cuts ``specs`` to this rank's part.
    """

    def __init__(self, specs: list[ParameterSpec], dtype: torch.dtype):
        super().__init__()
        self.specs = specs
        self._dtype = dtype

    def allocate(self, mesh: Mesh) -> None:
        """Makes this rank's part of the parameters, with undefined values."""
        self.specs = [spec.cut(mesh) for spec in self.specs]
        for spec in self.specs:
            empty = torch.empty(spec.shape, dtype=self._dtype)
            parameter = nn.Parameter(empty, requires_grad=False)
            self.register_parameter(spec.name.rpartition(".")[2], parameter)


def sum_parts(
    partials: Tensor, mesh: Mesh, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """The sum over all C parts, wherever they are.

    Args:
        partials: [parts, T, n] fp32, this rank's.
        mesh: the other parts are on the other ranks of its tp group.
        dtype: of the result.
        bias: [n], added before the one rounding.

    Returns:
        [L, n].

    Numerics: this rank's parts are a subtree, and the collective adds the upper levels.
    """
    if mesh.tp.num_ranks == 1:
        return kernels.tree_sum(partials, bias=bias, out_dtype=dtype)
    total = mesh.sum_over_tp(kernels.tree_sum(partials))
    return kernels.tree_sum(total[None], bias=bias, out_dtype=dtype)


class _ColumnLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gradient: str, mb: Microbatch
    ) -> Tensor:
        x = mb.mesh.gather_tokens(x)  # [T, in]
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.gradient, ctx.mb = bias is not None, gradient, mb
        return kernels.gemm(x, weight, transpose_b=True, bias=bias, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mb = ctx.mb
        dy = dy.contiguous()  # [parts, T, out / C]
        if ctx.has_bias:
            dbias = kernels.token_block_sum(dy.view(-1, dy.shape[-1]), len(dy))
            mb.gradients.push(_bias_name(ctx.gradient), mb.index, dbias)
        mb.gradients.push(ctx.gradient, mb.index, kernels.gemm(dy, x, transpose_a=True))
        dx = sum_parts(kernels.gemm(dy, weight), mb.mesh, dy.dtype)
        return dx, None, None, None, None


column_linear: Callable[..., Tensor] = _ColumnLinear.apply


def _bias_name(weight_name: str) -> str:
    return f"{weight_name.removesuffix('weight')}bias"


class ColumnLinear(Layer):
    """y[c] = x weight[c]^T + bias[c]: [L, in] -> [parts, T, out / C]."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        std: float,
        dtype: torch.dtype,
        *,
        bias: bool = True,
    ):
        specs = [column_spec(f"{name}.weight", (out_features, in_features), init_std=std)]
        if bias:
            specs.append(column_spec(f"{name}.bias", (out_features,), weight_decay=False))
        super().__init__(specs, dtype)
        self.gradient = f"{name}.weight"
        self.has_bias = bias

    def forward(self, x: Tensor, mb: Microbatch) -> Tensor:
        """[L, in] -> [parts, T, out / C], in the dtype of ``x``."""
        bias = self.bias if self.has_bias else None
        return column_linear(x, self.weight, bias, self.gradient, mb)


class _RowLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gradient: str, mb: Microbatch
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.gradient, ctx.mb = bias is not None, gradient, mb
        partials = kernels.gemm(x, weight, transpose_b=True)  # [parts, T, out]
        return sum_parts(partials, mb.mesh, x.dtype, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mb = ctx.mb
        dy = dy.contiguous()  # [L, out]
        if ctx.has_bias:
            dbias = kernels.token_block_sum(dy, mb.num_token_blocks)
            mb.gradients.push(_bias_name(ctx.gradient), mb.index, dbias)
        dy = mb.mesh.gather_tokens(dy)  # [T, out]
        mb.gradients.push(ctx.gradient, mb.index, kernels.gemm(dy, x, transpose_a=True))
        return kernels.gemm(dy, weight, out_dtype=dy.dtype), None, None, None, None


_row_linear: Callable[..., Tensor] = _RowLinear.apply


class RowLinear(Layer):
    """y = sum over c of x[c] weight[c]^T, + bias: [parts, T, in / C] -> [L, out]."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        std: float,
        dtype: torch.dtype,
        *,
        bias: bool = True,
    ):
        specs = [row_spec(f"{name}.weight", out_features, in_features, init_std=std)]
        if bias:
            specs.append(token_spec(f"{name}.bias", out_features))
        super().__init__(specs, dtype)
        self.gradient = f"{name}.weight"
        self.has_bias = bias

    def forward(self, x: Tensor, mb: Microbatch) -> Tensor:
        """[parts, T, in / C] -> [L, out], in the dtype of ``x``."""
        bias = self.bias if self.has_bias else None
        return _row_linear(x, self.weight, bias, self.gradient, mb)


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, name: str, mb: Microbatch
    ) -> Tensor:
        y, mean, rstd = kernels.layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.name, ctx.mb = name, mb
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        name, mb = ctx.name, ctx.mb
        dx, dweight, dbias = kernels.layer_norm_backward(
            dy.contiguous(), x, mean, rstd, weight, mb.num_token_blocks
        )
        mb.gradients.push(f"{name}.weight", mb.index, dweight)
        mb.gradients.push(f"{name}.bias", mb.index, dbias)
        return dx, None, None, None, None, None


_layer_norm: Callable[..., Tensor] = _LayerNorm.apply


class LayerNorm(Layer):
    """LayerNorm over the last dim."""

    def __init__(self, name: str, hidden_size: int, eps: float, dtype: torch.dtype):
        specs = [
            token_spec(f"{name}.weight", hidden_size, mean=1.0),
            token_spec(f"{name}.bias", hidden_size),
        ]
        super().__init__(specs, dtype)
        self.name = name
        self.eps = eps

    def forward(self, x: Tensor, mb: Microbatch) -> Tensor:
        """[L, h] -> [L, h]."""
        return _layer_norm(x, self.weight, self.bias, self.eps, self.name, mb)


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return kernels.gelu(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return kernels.gelu_backward(dy.contiguous(), x)


_gelu: Callable[..., Tensor] = _Gelu.apply


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, of any shape."""
    return _gelu(x)


class _GeluErf(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return kernels.gelu_erf(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return kernels.gelu_erf_backward(dy.contiguous(), x)


_gelu_erf: Callable[..., Tensor] = _GeluErf.apply


def gelu_erf(x: Tensor) -> Tensor:
    """GELU without approximation, of any shape."""
    return _gelu_erf(x)


class _DropoutAdd(Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, residual: Tensor, probability: float, key: int, token_ids: Tensor
    ) -> Tensor:
        ctx.probability, ctx.key, ctx.token_ids = probability, key, token_ids
        return kernels.dropout_add(y, residual, probability, key, token_ids)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dout = dout.contiguous()
        dy = kernels.dropout(dout, ctx.probability, ctx.key, ctx.token_ids)
        return dy, dout, None, None, None


_dropout_add: Callable[..., Tensor] = _DropoutAdd.apply


def dropout_add(
    y: Tensor, residual: Tensor, probability: float, key: int, token_ids: Tensor
) -> Tensor:
    """residual + dropout(y): [L, h], rounded once; an element's fate depends on its token only."""
    return _dropout_add(y, residual, probability, key, token_ids)
