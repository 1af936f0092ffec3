"""Self-attention on canonical parts: each part holds whole heads."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from primitives.arithmetic import kernels
from primitives.layout import NUM_PARTS
from scenarios.parallel.layers import ColumnLinear, RowLinear
from scenarios.parallel.microbatch import Microbatch


class _CoreAttention(Function):
    """softmax(q k^T / sqrt(d)) v on [parts, T, heads / C * 3 * d], one gemm per sample and head."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        head_dim: int,
        layer_number: int,
        probability: float,
        key: int,
        mb: Microbatch,
    ) -> Tensor:
        parts, num_tokens, width = qkv.shape
        heads = width // (3 * head_dim)
        ctx.split_shape = (parts, mb.seq_length, mb.num_samples, heads, 3, head_dim)
        # With query-key layer scaling the scores leave the gemm divided by the layer's number,
        # so that fp16 holds them; the softmax multiplies it back in fp32.
        ctx.alpha = 1.0 / (math.sqrt(head_dim) * layer_number)
        ctx.layer_number, ctx.probability, ctx.key = layer_number, probability, key
        ctx.mb = mb
        ctx.row_ids = mb.attention_row_ids(heads)

        by_head = qkv.view(ctx.split_shape).permute(4, 0, 2, 3, 1, 5).contiguous()
        q, k, v = by_head.view(3, -1, mb.seq_length, head_dim).unbind()  # [C * b * heads, s, d]
        scores = kernels.gemm(q, k, transpose_b=True, alpha=ctx.alpha, out_dtype=q.dtype)
        probs = mb.softmax(scores, heads, float(layer_number))
        dropped = _dropout(probs, ctx)
        ctx.save_for_backward(q, k, v, probs, dropped)
        context = kernels.gemm(dropped, v, out_dtype=q.dtype)
        context = context.view(parts, mb.num_samples, heads, mb.seq_length, head_dim)
        return context.permute(0, 3, 1, 2, 4).reshape(parts, num_tokens, heads * head_dim)

    @staticmethod
    def backward(ctx: Any, dcontext: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probs, dropped = ctx.saved_tensors
        parts, seq_length, num_samples, heads, _, head_dim = ctx.split_shape
        dcontext = dcontext.reshape(parts, seq_length, num_samples, heads, head_dim)
        dcontext = dcontext.permute(0, 2, 3, 1, 4).reshape(-1, seq_length, head_dim)
        dtype = q.dtype
        dv = kernels.gemm(dropped, dcontext, transpose_a=True, out_dtype=dtype)
        dprobs = _dropout(kernels.gemm(dcontext, v, transpose_b=True, out_dtype=dtype), ctx)
        dscores = ctx.mb.softmax_backward(dprobs, probs, heads, float(ctx.layer_number))
        dq = kernels.gemm(dscores, k, alpha=ctx.alpha, out_dtype=dtype)
        dk = kernels.gemm(dscores, q, transpose_a=True, alpha=ctx.alpha, out_dtype=dtype)
        by_head = torch.stack((dq, dk, dv))
        by_head = by_head.view(3, parts, num_samples, heads, seq_length, head_dim)
        dqkv = by_head.permute(1, 4, 2, 3, 0, 5).reshape(parts, seq_length * num_samples, -1)
        return dqkv, None, None, None, None, None


_core_attention: Callable[..., Tensor] = _CoreAttention.apply


def _dropout(probs: Tensor, ctx: Any) -> Tensor:
    """Dropout of [heads, s, s] by global (sample, head, query) row."""
    rows = probs.view(-1, probs.shape[-1])
    return kernels.dropout(rows, ctx.probability, ctx.key, ctx.row_ids).view_as(probs)


class SelfAttention(torch.nn.Module):
    """QKV projection, attention as the microbatch masks it, and output projection."""

    def __init__(
        self,
        name: str,
        layer: int,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        layer_scaling: bool,
        std: float,
        output_std: float,
        dtype: torch.dtype,
        *,
        bias: bool = True,
    ):
        super().__init__()
        if num_heads % NUM_PARTS or hidden_size % num_heads:
            raise ValueError(
                f"{num_heads} attention heads and hidden size {hidden_size}; expected heads to be "
                f"a multiple of {NUM_PARTS} and to divide the hidden size"
            )
        self.layer = layer
        self.head_dim = hidden_size // num_heads
        self.dropout = dropout
        self.layer_number = layer + 1 if layer_scaling else 1
        self.linear_qkv = ColumnLinear(
            f"{name}.linear_qkv", hidden_size, 3 * hidden_size, std, dtype, bias=bias
        )
        self.linear_proj = RowLinear(
            f"{name}.linear_proj", hidden_size, hidden_size, output_std, dtype, bias=bias
        )

    def forward(self, x: Tensor, mb: Microbatch) -> Tensor:
        """[local tokens, h] -> [local tokens, h] in the dtype of ``x``."""
        key = mb.dropout_key(self.layer, "attention")
        qkv = self.linear_qkv(x, mb)
        context = _core_attention(qkv, self.head_dim, self.layer_number, self.dropout, key, mb)
        return cast(Tensor, self.linear_proj(context, mb))
