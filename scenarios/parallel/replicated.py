"""Layers that are not cut into canonical parts: every tensor-parallel rank computes them whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from primitives import canonical
from primitives.layout import NUM_PARTS, NUM_SLICES
from scenarios.parallel.layers import Layer
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.parameters import ParameterSpec


class _ReplicatedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        name: str,
        num_blocks: int,
        mb: Microbatch,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_numel, ctx.name, ctx.num_blocks, ctx.mb = bias.numel(), name, num_blocks, mb
        used = bias[: len(weight)]
        return canonical.gemm(x, weight, transpose_b=True, bias=used, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        name, mb, num_blocks = ctx.name, ctx.mb, ctx.num_blocks
        dy = dy.contiguous()  # [T, out]
        dbias = canonical.token_block_sum(dy, num_blocks)
        dbias = functional.pad(dbias, (0, ctx.bias_numel - dy.shape[1]))
        mb.gradients.push(f"{name}.bias", mb.index, dbias)
        dy_blocks, x_blocks = (t.view(num_blocks, -1, t.shape[1]) for t in (dy, x))
        dweight = canonical.gemm(dy_blocks, x_blocks, transpose_a=True)
        mb.gradients.push(f"{name}.weight", mb.index, dweight)
        dx = canonical.gemm(dy, weight, out_dtype=dy.dtype)
        return dx, None, None, None, None, None


_replicated_linear: Callable[..., Tensor] = _ReplicatedLinear.apply


class ReplicatedLinear(Layer):
    """y = x weight^T + bias: [T, in] -> [T, out], one gemm over all of ``in``.

    Weight and bias gradients are sums over tokens and stay ``num_blocks`` partial sums until last:
    NUM_PARTS for the tokens of a microbatch, 1 for few rows that one rank has all of. The bias is
    stored with zeros up to a multiple of NUM_SLICES; they stay zero and count in num-zeros.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        std: float,
        dtype: torch.dtype,
        num_blocks: int = NUM_PARTS,
    ):
        weight, bias = f"{name}.weight", f"{name}.bias"
        bias_numel = -(-out_features // NUM_SLICES) * NUM_SLICES
        specs = [
            ParameterSpec(
                weight, (out_features, in_features), 1, (weight,), num_blocks, init_std=std
            ),
            ParameterSpec(bias, (bias_numel,), 1, (bias,), num_blocks, weight_decay=False),
        ]
        super().__init__(specs, dtype)
        self.name = name
        self.num_blocks = num_blocks

    def forward(self, x: Tensor, mb: Microbatch) -> Tensor:
        """[T, in] -> [T, out], in the dtype of ``x``."""
        return _replicated_linear(x, self.weight, self.bias, self.name, self.num_blocks, mb)


class _Tanh(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = canonical.tanh(x.float()).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        slope: Tensor = 1.0 - y.float() * y.float()
        return (dy.float() * slope).to(dy.dtype)


_tanh: Callable[..., Tensor] = _Tanh.apply


def tanh(x: Tensor) -> Tensor:
    """tanh, of any shape; the slope is 1 - y * y of the rounded y."""
    return _tanh(x)


class _GeluErf(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return canonical.gelu_erf(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return canonical.gelu_erf_backward(dy.contiguous(), x)


_gelu_erf: Callable[..., Tensor] = _GeluErf.apply


def gelu_erf(x: Tensor) -> Tensor:
    """GELU without approximation, of any shape."""
    return _gelu_erf(x)


class _FirstRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_rows: int) -> Tensor:
        ctx.shape = x.shape
        return x[:num_rows].clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy.new_zeros(ctx.shape)
        dx[: len(dy)] = dy
        return dx, None


_first_rows: Callable[..., Tensor] = _FirstRows.apply


def first_rows(x: Tensor, num_rows: int) -> Tensor:
    """[T, h] -> [num_rows, h]: with the samples' number, the tokens at position 0."""
    return _first_rows(x, num_rows)
