"""The public functions on hidden states and the head's weight: no logits of all the vocabulary."""

import torch.distributed as dist
from torch import Tensor

from primitives.vocab_parallel.functions import IGNORE_INDEX, loss_of
from primitives.vocab_parallel.linear_ops import linear_vocab_entropy


def linear_entropy(
    hidden: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """``entropy(hidden @ weight.T)``, a 16th of the vocabulary at a time.

    Args:
        hidden: [..., hidden size] float32, bfloat16 or float16 on the CPU, equal on all ranks.
        weight: [columns, hidden size] of its dtype: this rank's rows of the head.
        group, vocab_size, temperature: as in ``entropy``.

    Returns:
        [...] float32, equal on all ranks. The gradient of ``hidden`` is the sum over the ranks;
        that of ``weight`` is of this rank's rows.

    Raises:
        ValueError: as in ``entropy``.

    Contract: forward has one all_gather, backward one all_reduce of [..., hidden size] float32.
        Backward computes the logits once more.

    Numerics: the products are torch's, rounded to the dtype of ``hidden``; the entropy is that of
        ``entropy`` on them. Products of one shape per segment: on one machine the same bits for
        every size of the group. The 16 segments' gradients of ``hidden`` are added by the tree in
        float32, over ranks by the group's all_reduce (the "primitives" backend: the same tree).
    """
    return _results(hidden, weight, None, group, vocab_size, IGNORE_INDEX, temperature)[0]


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
) -> Tensor:
    """``log_prob(hidden @ weight.T, labels)``; see ``linear_entropy``."""
    return _results(hidden, weight, labels, group, vocab_size, ignore_index, temperature)[1]


def linear_entropy_and_log_prob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``entropy_and_log_prob(hidden @ weight.T, labels)``; see ``linear_entropy``."""
    results = _results(hidden, weight, labels, group, vocab_size, ignore_index, temperature)
    return results[0], results[1]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
) -> Tensor:
    """``cross_entropy(hidden @ weight.T, labels)``; see ``linear_entropy``."""
    _, log_prob, lse, _ = _results(
        hidden, weight, labels, group, vocab_size, ignore_index, temperature
    )
    return loss_of(log_prob, lse, labels, z_loss, ignore_index)


def _results(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    ignore_index: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = "" if group is None else group.group_name
    results: tuple[Tensor, Tensor, Tensor, Tensor] = linear_vocab_entropy(
        hidden, weight, labels, name, vocab_size, ignore_index, temperature
    )
    return results
