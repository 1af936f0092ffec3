"""Layers that are not cut into canonical parts: every tensor-parallel rank computes them whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from primitives.arithmetic import kernels
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
        return kernels.gemm(x, weight, transpose_b=True, bias=used, out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        name, mb, num_blocks = ctx.name, ctx.mb, ctx.num_blocks
        dy = dy.contiguous()  # [T, out]
        dbias = kernels.token_block_sum(dy, num_blocks)
        dbias = functional.pad(dbias, (0, ctx.bias_numel - dy.shape[1]))
        mb.gradients.push(f"{name}.bias", mb.index, dbias)
        dy_blocks, x_blocks = (t.view(num_blocks, -1, t.shape[1]) for t in (dy, x))
        dweight = kernels.gemm(dy_blocks, x_blocks, transpose_a=True)
        mb.gradients.push(f"{name}.weight", mb.index, dweight)
        dx = kernels.gemm(dy, weight, out_dtype=dy.dtype)
        return dx, None, None, None, None, None


_replicated_linear: Callable[..., Tensor] = _ReplicatedLinear.apply


class ReplicatedLinear(Layer):
    """y = x weight^T + bias: [rows, in] -> [rows, out], one gemm over all of ``in``.

    The bias is stored with zeros up to a multiple of NUM_SLICES; they stay zero and count in
    num-zeros.

    Args:
        per_token: rows are local tokens, and the gradients stay a partial sum for each token block
            until last; otherwise all tp ranks have the same few rows.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        std: float,
        dtype: torch.dtype,
        *,
        per_token: bool = True,
    ):
        weight, bias = f"{name}.weight", f"{name}.bias"
        bias_numel = -(-out_features // NUM_SLICES) * NUM_SLICES
        num_partials = NUM_PARTS if per_token else 1
        specs = [
            ParameterSpec(
                weight,
                (out_features, in_features),
                1,
                (weight,),
                num_partials,
                init_std=std,
                sums_tokens=per_token,
            ),
            ParameterSpec(
                bias,
                (bias_numel,),
                1,
                (bias,),
                num_partials,
                weight_decay=False,
                sums_tokens=per_token,
            ),
        ]
        super().__init__(specs, dtype)
        self.name = name
        self.per_token = per_token

    def forward(self, x: Tensor, mb: Microbatch) -> Tensor:
        """[rows, in] -> [rows, out], in the dtype of ``x``."""
        num_blocks = mb.num_token_blocks if self.per_token else 1
        return _replicated_linear(x, self.weight, self.bias, self.name, num_blocks, mb)


class _Tanh(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = kernels.tanh(x.float()).to(x.dtype)
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


class _FirstTokens(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mb: Microbatch) -> Tensor:
        ctx.shape, ctx.has_them = x.shape, mb.local_slice.start == 0
        first = x[: mb.num_samples]
        return mb.mesh.gather_tokens(first)[: mb.num_samples].clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy.new_zeros(ctx.shape)
        if ctx.has_them:
            dx[: len(dy)] = dy
        return dx, None


_first_tokens: Callable[..., Tensor] = _FirstTokens.apply


def first_tokens(x: Tensor, mb: Microbatch) -> Tensor:
    """The tokens at position 0, on all tp ranks: [L, h] -> [samples, h].

    Contract: what all tp ranks do with them is the same, so backward communicates nothing.
    """
    return _first_tokens(x, mb)


class _ClassEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        loss, maximum, sum_exp = kernels.cross_entropy(logits[None], targets)
        ctx.save_for_backward(logits, targets, maximum, sum_exp)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, maximum, sum_exp = ctx.saved_tensors
        dlogits = kernels.cross_entropy_backward(
            logits[None], targets, maximum, sum_exp, dloss.contiguous()
        )
        return dlogits[0], None


_class_entropy: Callable[..., Tensor] = _ClassEntropy.apply


def class_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of logits that every rank has whole.

    Args:
        logits: [rows, classes].
        targets: [rows] int64.
    Returns:
        [rows] fp32.
    """
    return _class_entropy(logits, targets)
