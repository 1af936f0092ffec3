"""The operators ``primitives::vocab_entropy`` and its backward, for autograd and torch.compile.

An operator checks its arguments when it runs, not when it is traced: then only their shapes are
known.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from primitives.vocab_parallel.exchange import (
    HEADER,
    Ranks,
    check_headers,
    exchange,
    new_message,
    quads_of,
    refuse_capture,
    write_header,
)
from primitives.vocab_parallel.kernels import kernels_for
from primitives.vocab_parallel.shard import Shard, shard_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def scale_of(temperature: float) -> float:
    """What logits are multiplied by: 1 / temperature in float32.

    Raises:
        ValueError: that is no positive finite number.
    """
    if temperature > 0 and math.isfinite(temperature):
        scale = ctypes.c_float(1 / temperature).value
        if 0 < scale < math.inf:
            return scale
    raise ValueError(f"temperature: expected a positive finite number, got {temperature}")


def check_labels(labels: Tensor | None, of: Tensor) -> None:
    """Raises ValueError unless there is a label for each vector of ``of``."""
    if labels is not None and (
        labels.shape != of.shape[:-1] or labels.dtype != torch.int64 or labels.device != of.device
    ):
        raise ValueError(
            f"labels: expected {list(of.shape[:-1])} of torch.int64 on {of.device}, "
            f"got {list(labels.shape)} of {labels.dtype} on {labels.device}"
        )


def check(logits: Tensor, labels: Tensor | None, vocab_size: int | None, ranks: Ranks) -> Shard:
    """Raises ValueError unless the arguments of this rank fit together; which columns it has."""
    if logits.dim() < 1 or logits.dtype not in DTYPES:
        raise ValueError(
            "logits: expected [..., columns] of float32, bfloat16 or float16, "
            f"got {list(logits.shape)} of {logits.dtype} on {logits.device}"
        )
    check_labels(labels, logits)
    return shard_of(logits.shape[-1], vocab_size, ranks.rank, ranks.num_ranks)


def rows_of(logits: Tensor) -> Tensor:
    """[..., columns] as [tokens, columns] with contiguous rows; copied only where it must be."""
    if logits.dim() == 2 and logits.is_contiguous():
        return logits
    columns = logits.shape[-1]
    num_tokens = math.prod(logits.shape[:-1])
    if logits.stride(-1) != 1 and columns > 1:
        logits = logits.contiguous()
    rows = logits.reshape(num_tokens, columns)
    return rows if num_tokens <= 1 or rows.stride(0) >= columns else rows.contiguous()


def flat(x: Tensor | None) -> Tensor | None:
    """[...] as [tokens], contiguous."""
    return x if x is None or (x.dim() == 1 and x.is_contiguous()) else x.reshape(-1).contiguous()


@torch.library.custom_op("primitives::vocab_entropy", mutates_args=())
def vocab_entropy(
    logits: Tensor,
    labels: Tensor | None,
    group_name: str,
    vocab_size: int | None,
    ignore_index: int,
    temperature: float,
    inplace_backward: bool,
    mode: str = "portable",
    check_input: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """entropy, log_prob, log_sum_exp [...] and the quads [..., 4] that the backward needs."""
    ranks = Ranks.named(group_name)
    kernels = kernels_for(logits.device, mode)
    shard = check(logits, labels, vocab_size, ranks)
    scale, rows, targets = scale_of(temperature), rows_of(logits), flat(labels)
    reads_back = check_input and (labels is not None or ranks.group is not None)
    if reads_back:
        refuse_capture(logits.device)
    message = new_message(rows.shape[0], logits.device)
    if reads_back:
        write_header(message, targets, shard.vocab_size, ignore_index)
    else:
        message[:HEADER] = 0
    kernels.forward(
        rows, targets, ignore_index, shard.first, shard.segment_length, shard.num_segments, scale,
        quads_of(message),
    )  # fmt: skip
    messages = exchange(message, ranks)
    if reads_back:
        check_headers(messages, tuple(logits.shape[:-1]))
    quads, *results = kernels.finish(quads_of(messages), targets, ignore_index, scale)
    entropy, log_prob, log_sum_exp = (x.view(logits.shape[:-1]) for x in results)
    return entropy, log_prob, log_sum_exp, quads.view(*logits.shape[:-1], 4)


@vocab_entropy.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = logits.shape[:-1]
    results = (logits.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return *results, logits.new_empty((*shape, 4), dtype=torch.float32)  # type: ignore[return-value]


def _write_gradient(
    out: Tensor,
    logits: Tensor,
    labels: Tensor | None,
    quads: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    group_name: str,
    vocab_size: int | None,
    ignore_index: int,
    temperature: float,
    mode: str,
) -> None:
    kernels = kernels_for(logits.device, mode)
    shard = check(logits, labels, vocab_size, Ranks.named(group_name))
    num_tokens = math.prod(logits.shape[:-1])
    by_entropy, by_log_prob, by_log_sum_exp = map(flat, gradients)
    kernels.backward(
        rows_of(logits), flat(labels), ignore_index, shard.first, scale_of(temperature),
        quads.view(num_tokens, 4), by_entropy, by_log_prob, by_log_sum_exp,
        out.view(num_tokens, logits.shape[-1]),
    )  # fmt: skip


@torch.library.custom_op("primitives::vocab_entropy_backward", mutates_args=())
def vocab_entropy_backward(
    logits: Tensor,
    labels: Tensor | None,
    quads: Tensor,
    grad_entropy: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    group_name: str,
    vocab_size: int | None,
    ignore_index: int,
    temperature: float,
    mode: str = "portable",
) -> Tensor:
    """The gradient by this rank's logits, like them, contiguous."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    gradients = (grad_entropy, grad_log_prob, grad_log_sum_exp)
    _write_gradient(
        out, logits, labels, quads, gradients, group_name, vocab_size, ignore_index, temperature,
        mode,
    )  # fmt: skip
    return out


@vocab_entropy_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("primitives::vocab_entropy_backward_", mutates_args={"logits"})
def vocab_entropy_backward_(
    logits: Tensor,
    labels: Tensor | None,
    quads: Tensor,
    grad_entropy: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    group_name: str,
    vocab_size: int | None,
    ignore_index: int,
    temperature: float,
    mode: str = "portable",
) -> None:
    """The same, into the contiguous logits."""
    gradients = (grad_entropy, grad_log_prob, grad_log_sum_exp)
    _write_gradient(
        logits, logits, labels, quads, gradients, group_name, vocab_size, ignore_index,
        temperature, mode,
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *settings, ctx.inplace_backward, mode, _ = inputs
    ctx.settings = (*settings, mode)
    ctx.save_for_backward(logits, labels, output[3])
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, labels, quads = ctx.saved_tensors
    arguments = (logits, labels, quads, *grads[:3], *ctx.settings)
    rest = (None,) * 8
    if all(grad is None for grad in grads[:3]):
        return None, *rest
    if ctx.inplace_backward:
        vocab_entropy_backward_(*arguments)
        return logits.detach(), *rest
    return vocab_entropy_backward(*arguments), *rest


vocab_entropy.register_autograd(_backward, setup_context=_setup_context)
