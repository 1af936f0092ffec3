"""The public functions on logits."""

import torch
import torch.distributed as dist
from torch import Tensor

from primitives.vocab_parallel.ops import vocab_entropy

IGNORE_INDEX = -100
"""torch.nn.functional.cross_entropy's."""


def entropy(
    logits: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    mode: str = "portable",
    check_input: bool = True,
) -> Tensor:
    """Entropy of softmax(logits / temperature) of each token, in nats.

    Args:
        logits: [..., columns] float32, bfloat16 or float16, on the CPU or CUDA, rows of any stride:
            this rank's columns of the vocabulary, which is cut into 16 segments of
            ceil(vocab_size / 16) columns; each rank holds 16 / n of them, in rank order.
        group: the n = 1, 2, 4, 8 or 16 ranks that hold the vocabulary, of any backend; None: this
            rank holds all of it.
        vocab_size: columns of the full vocabulary. Default: n times this rank's.
        temperature: positive.
        inplace_backward: backward writes the gradient into the memory of the logits and allocates
            nothing. They must be contiguous, no leaf of autograd, and unused by others: a later use
            by autograd is its error about in-place changes. Without effect under torch.compile.
        mode: how exp is computed on CUDA: "portable", by the polynomial of the definition, which
            gives the bits of the CPU; or "device", by the GPU's own instruction, which is faster
            and gives other bits. The CPU has one way, for both.
        check_input: False: the host reads nothing back. So on CUDA it need not wait for the device
            (a CUDA graph demands that), a label outside the vocabulary has log_prob -inf instead of
            an error, and ranks with different vocabularies are not noticed.

    Returns:
        [...] float32, the same bits on all ranks. NaN where a logit is NaN or inf, or all of a
        token's are -inf. A logit of -inf has probability 0 and gradient 0.

    Raises:
        ValueError: a wrong shape, dtype, device or number of columns, or (on all ranks) ranks with
            vocabularies of different sizes.
        RuntimeError: CUDA refuses a launch.

    Contract: all ranks of the group call together; backward needs no communication, but a gradient
        that is equal on all ranks. Threads: as many as torch uses.

    Stream: on CUDA everything is enqueued on the current stream of the logits' device.

    Numerics: docs/canonical-arithmetic.md, "Vocabulary entropy"; the gradient is rounded once to
        the dtype of the logits, +0 where a token's incoming gradients are all 0.
    """
    return _results(
        logits, None, group, vocab_size, IGNORE_INDEX, temperature, inplace_backward, mode,
        check_input,
    )[0]  # fmt: skip


def log_prob(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    mode: str = "portable",
    check_input: bool = True,
) -> Tensor:
    """Log-probability of each token's label under softmax(logits / temperature).

    Args:
        logits, group, vocab_size, temperature, inplace_backward, mode, check_input: as in
            ``entropy``.
        labels: [...] int64, columns of the full vocabulary, equal on all ranks of the group.
        ignore_index: the label of tokens whose result and gradient are 0.

    Returns:
        [...] float32; -inf where the label's logit is.

    Raises:
        ValueError: as in ``entropy``; or (on all ranks) a label outside the vocabulary, with its
            rank and position.
    """
    return _results(
        logits, labels, group, vocab_size, ignore_index, temperature, inplace_backward, mode,
        check_input,
    )[1]  # fmt: skip


def entropy_and_log_prob(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    mode: str = "portable",
    check_input: bool = True,
) -> tuple[Tensor, Tensor]:
    """``entropy`` and ``log_prob`` together, for the price of one.

    An ignored token has an entropy and its gradient all the same.
    """
    results = _results(
        logits, labels, group, vocab_size, ignore_index, temperature, inplace_backward, mode,
        check_input,
    )  # fmt: skip
    return results[0], results[1]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    mode: str = "portable",
    check_input: bool = True,
) -> Tensor:
    """-log_prob + z_loss * log(sum exp(logits / temperature))^2 of each token.

    Args and errors: as in ``log_prob``.

    Returns:
        [...] float32; 0 for ignored tokens.

    Numerics: ``0 - log_prob``, plus ``z_loss * (lse * lse)`` unless z_loss is 0: one rounding each.

    Source: the z-loss of PaLM (Chowdhery et al., 2022), section 5.
    """
    _, logp, lse, _ = _results(
        logits, labels, group, vocab_size, ignore_index, temperature, inplace_backward, mode,
        check_input,
    )  # fmt: skip
    return loss_of(logp, lse, labels, z_loss, ignore_index)


def loss_of(logp: Tensor, lse: Tensor, labels: Tensor, z_loss: float, ignore_index: int) -> Tensor:
    """``cross_entropy`` from its ingredients."""
    loss = 0.0 - logp
    if z_loss == 0.0:
        return loss
    lse = torch.where(labels == ignore_index, 0.0, lse)
    return loss + z_loss * (lse * lse)


def _results(
    logits: Tensor,
    labels: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    ignore_index: int,
    temperature: float,
    inplace_backward: bool,
    mode: str,
    check_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inplace = inplace_backward and not torch.compiler.is_compiling()
    if inplace and logits.requires_grad and (logits.is_leaf or not logits.is_contiguous()):
        raise ValueError(
            "inplace_backward: expected contiguous logits that are no leaf of autograd, got "
            + ("a leaf" if logits.is_leaf else f"strides {logits.stride()}")
        )
    results: tuple[Tensor, Tensor, Tensor, Tensor] = vocab_entropy(
        logits, labels, "" if group is None else group.group_name, vocab_size, ignore_index,
        temperature, inplace, mode, check_input,
    )  # fmt: skip
    return results
