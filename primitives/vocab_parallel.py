"""Entropy and log-probability of logits whose vocabulary is split over the ranks of a group.

[Note: parts] A sum over the vocabulary is an adjacent-pair tree inside each of 8 equal parts of the
full vocabulary, then the tree over the parts. A rank holds whole parts, and the group's all_reduce
continues the same tree over the ranks. So the result is the same bits for every size of the group.
"""

from typing import Any

import torch
import torch.distributed as dist

from primitives.layout import NUM_PARTS


def vocab_parallel_entropy(
    logits: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Entropy of softmax(logits) for each token.

    Args:
        logits: [tokens, vocab / group size] fp32, bf16 or fp16: this rank's columns. Never altered.
        group: the ranks that hold the vocabulary, in rank order; None: this rank holds all of it.

    Returns:
        [tokens] fp32, equal on all ranks of the group. The gradient handed to backward must be
        equal on all ranks too; each rank gets that of its own columns, in the dtype of the logits.

    Raises:
        ValueError: the shape is not two-dimensional, or the vocabulary is not 8 equal parts of
            which each rank holds a whole number.

    Numerics:
        fp32 inside, for half precision too. Two all_reduces: max, and two sums in one. Columns of
        -inf (padding) have probability 0 and gradient 0.

    Source:
        H = log(sum exp(z - max)) - sum(p (z - max)); dH/dz = -p (z - max - sum(p (z - max))).
    """
    entropy: torch.Tensor = _Entropy.apply(logits, group)  # type: ignore[no-untyped-call]
    return entropy


def vocab_parallel_log_prob(
    logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Log-probability of each token's target.

    Args:
        logits: as in ``vocab_parallel_entropy``.
        targets: [tokens] int64, columns of the full vocabulary, equal on all ranks of the group.
        group: as in ``vocab_parallel_entropy``.

    Returns:
        [tokens] fp32; see ``vocab_parallel_entropy`` for gradients and numerics.

    Raises:
        ValueError: as in ``vocab_parallel_entropy``; or a target outside the vocabulary.

    Source:
        log p = z_target - max - log(sum exp(z - max)); its gradient is onehot - p.
    """
    vocab = logits.shape[-1] * group_size(group)
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets: expected [tokens] = {list(logits.shape[:1])}, got {list(targets.shape)}"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise ValueError(
            f"targets: expected 0 <= target < {vocab}, "
            f"got values from {int(targets.min())} to {int(targets.max())}"
        )
    log_prob: torch.Tensor = _LogProb.apply(  # type: ignore[no-untyped-call]
        logits, targets, group
    )
    return log_prob


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        row_max, sum_exp, mean = row_statistics(logits, group)
        ctx.save_for_backward(logits, row_max, sum_exp, mean)
        return sum_exp.log() - mean

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, row_max, sum_exp, mean = ctx.saved_tensors
        shifted = logits.float() - row_max[:, None]
        probs = shifted.exp().div_(sum_exp[:, None])
        grad = shifted.sub_(mean[:, None]).mul_(probs).mul_(-grads[0][:, None])
        return grad.masked_fill_(probs == 0, 0.0).to(logits.dtype), None


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        row_max, sum_exp, _ = row_statistics(logits, group)
        columns = targets - group_rank(group) * logits.shape[1]
        mine = (columns >= 0) & (columns < logits.shape[1])
        columns = columns.clamp(0, logits.shape[1] - 1)
        target_logits = logits.gather(1, columns[:, None])[:, 0].float()
        target_logits = torch.where(mine, target_logits, 0.0)
        if group is not None:
            dist.all_reduce(target_logits, group=group)
        ctx.save_for_backward(logits, row_max, sum_exp, columns, mine)
        return target_logits - row_max - sum_exp.log()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, row_max, sum_exp, columns, mine = ctx.saved_tensors
        grad = (logits.float() - row_max[:, None]).exp_().div_(-sum_exp[:, None])
        grad.scatter_add_(1, columns[:, None], mine[:, None].to(grad.dtype))
        return grad.mul_(grads[0][:, None]).to(logits.dtype), None, None


def row_statistics(
    logits: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Max, sum of exp(z - max) and mean of z - max under softmax, each [tokens] fp32."""
    size = group_size(group)
    if logits.dim() != 2:
        raise ValueError(f"logits: expected [tokens, vocab / {size}], got {list(logits.shape)}")
    tokens, columns = logits.shape
    if NUM_PARTS % size or columns % (NUM_PARTS // size):
        raise ValueError(
            f"logits: the vocabulary must be {NUM_PARTS} equal parts, a whole number of them on "
            f"each rank; got {columns} columns on each of {size} ranks"
        )
    row_max = logits.amax(dim=1).float()
    if group is not None:
        dist.all_reduce(row_max, dist.ReduceOp.MAX, group=group)
    shifted = logits.float() - row_max[:, None]  # [tokens, columns]
    exp = shifted.exp()
    weighted = shifted.mul_(exp).masked_fill_(exp == 0, 0.0)  # -inf * 0 is no number
    parts = (tokens, NUM_PARTS // size, -1)
    sums = torch.stack([tree_sum(tree_sum(x.view(parts))) for x in (exp, weighted)])
    if group is not None:
        dist.all_reduce(sums, group=group)
    return row_max, sums[0], sums[1] / sums[0]


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension: adjacent pairs, level by level, an odd last one carried up."""
    while (length := x.shape[-1]) > 1:
        pairs = x[..., 0 : length - 1 : 2] + x[..., 1:length:2]
        x = torch.cat([pairs, x[..., length - 1 :]], dim=-1) if length % 2 else pairs
    return x[..., 0]


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()
