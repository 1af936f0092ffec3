"""The operator ``primitives::linear_vocab_entropy``: the head and the entropy, by segment.

[Note: by segment] Logits exist for one segment of the vocabulary at a time, a 16th of it, in memory
that is used again. Backward makes them anew. Every product has the shape of a segment, whatever the
number of ranks, so on one machine the library gives it the same bits in every layout.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import primitives._C as _C
from primitives._C import VocabShard
from primitives.canonical import tree_sum

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Segments:
    """The segments of one rank, one after the other: logits [tokens, columns of the segment]."""

    def __init__(self, hidden: Tensor, weight: Tensor, shard: VocabShard) -> None:
        self.hidden = hidden
        self.weight = weight
        self.shard = shard
        longest = min(shard.segment_length, shard.num_columns)
        self._room = hidden.new_empty(hidden.shape[0] * longest)

    def bounds(self, segment: int) -> tuple[int, int]:
        """Its columns among this rank's."""
        columns = self.shard.num_columns
        length = self.shard.segment_length
        return min(columns, segment * length), min(columns, (segment + 1) * length)

    def logits(self, segment: int) -> Tensor:
        """hidden W^T of its columns, valid until the next call."""
        begin, end = self.bounds(segment)
        shape = self.hidden.shape[0], end - begin
        out = self._room[: math.prod(shape)].view(shape)
        return torch.mm(self.hidden, self.weight[begin:end].T, out=out)


def _shard(hidden: Tensor, weight: Tensor, group_name: str, vocab_size: int | None) -> VocabShard:
    if hidden.dim() < 1 or hidden.dtype not in DTYPES or hidden.device.type != "cpu":
        raise ValueError(
            "hidden: expected [..., hidden size] of float32, bfloat16 or float16 on the CPU, "
            f"got {list(hidden.shape)} of {hidden.dtype} on {hidden.device}"
        )
    if (
        weight.dim() != 2
        or weight.shape[1] != hidden.shape[-1]
        or weight.dtype != hidden.dtype
        or weight.device != hidden.device
    ):
        raise ValueError(
            f"weight: expected [columns, {hidden.shape[-1]}] of {hidden.dtype} like hidden, got "
            f"{list(weight.shape)} of {weight.dtype} on {weight.device}"
        )
    return _C.vocab_shard_of(weight.shape[0], vocab_size, group_name)


def _rows(hidden: Tensor) -> Tensor:
    return hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1]).contiguous()


@torch.library.custom_op("primitives::linear_vocab_entropy", mutates_args=())
def linear_vocab_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    group_name: str,
    vocab_size: int | None,
    ignore_index: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """entropy, log_prob, log_sum_exp [...] and the quads [..., 4] that the backward needs."""
    shard = _shard(hidden, weight, group_name, vocab_size)
    targets = _C.vocab_labels_for(hidden, labels)
    scale, rows = _C.vocab_scale_of(temperature), _rows(hidden)
    segments = _Segments(rows, weight, shard)
    of_segment = torch.empty(shard.num_segments, len(rows), 4)
    for segment, quads in enumerate(of_segment):
        first = shard.first + segments.bounds(segment)[0]
        _C.vocab_entropy_forward(
            segments.logits(segment), targets, ignore_index, first, shard.segment_length, 1, scale,
            quads,
        )  # fmt: skip
    own = _C.vocab_entropy_finish(of_segment, None, ignore_index, scale)[0]
    of_rank = _C.vocab_entropy_exchange(
        own, group_name, shard.vocab_size, targets, ignore_index, hidden.shape[:-1]
    )
    quads, *results = _C.vocab_entropy_finish(of_rank, targets, ignore_index, scale)
    entropy, log_prob, log_sum_exp = (x.view(hidden.shape[:-1]) for x in results)
    return entropy, log_prob, log_sum_exp, quads.view(*hidden.shape[:-1], 4)


@linear_vocab_entropy.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = hidden.shape[:-1]
    results = (hidden.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return *results, hidden.new_empty((*shape, 4), dtype=torch.float32)  # type: ignore[return-value]


@torch.library.custom_op("primitives::linear_vocab_entropy_backward", mutates_args=())
def linear_vocab_entropy_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    quads: Tensor,
    grad_entropy: Tensor | None,
    grad_log_prob: Tensor | None,
    grad_log_sum_exp: Tensor | None,
    group_name: str,
    vocab_size: int | None,
    ignore_index: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The gradients by hidden, summed over the ranks, and by this rank's weight."""
    shard = _shard(hidden, weight, group_name, vocab_size)
    targets = _C.vocab_labels_for(hidden, labels)
    scale, rows = _C.vocab_scale_of(temperature), _rows(hidden)
    gradients = (
        None if x is None else x.reshape(-1).contiguous()
        for x in (grad_entropy, grad_log_prob, grad_log_sum_exp)
    )
    by_entropy, by_log_prob, by_log_sum_exp = gradients
    segments = _Segments(rows, weight, shard)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    partial = rows.new_zeros(shard.num_segments, *rows.shape)
    for segment in range(shard.num_segments):
        begin, end = segments.bounds(segment)
        dlogits = segments.logits(segment)
        _C.vocab_entropy_backward(
            dlogits, targets, ignore_index, shard.first + begin, scale, quads.view(len(rows), 4),
            by_entropy, by_log_prob, by_log_sum_exp, dlogits,
        )  # fmt: skip
        torch.mm(dlogits.T, rows, out=grad_weight[begin:end])
        torch.mm(dlogits, weight[begin:end], out=partial[segment])
    total = tree_sum(partial)  # [tokens, hidden size] float32
    if group_name:
        c10d: Any = dist.distributed_c10d  # as functional collectives find their group
        dist.all_reduce(total, group=c10d._resolve_process_group(group_name))
    return total.to(hidden.dtype).view(hidden.shape), grad_weight


@linear_vocab_entropy_backward.register_fake
def _(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, labels, output[3])
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 5
    if all(grad is None for grad in grads[:3]):
        return None, None, *rest
    hidden, weight, labels, quads = ctx.saved_tensors
    by_hidden, by_weight = linear_vocab_entropy_backward(
        hidden, weight, labels, quads, *grads[:3], *ctx.settings
    )
    return by_hidden, by_weight, *rest


linear_vocab_entropy.register_autograd(_backward, setup_context=_setup_context)
