"""Native arithmetic: the kernels of ``primitives.canonical`` by operators of torch (MKL, oneDNN).

The functions that training uses: same shapes, dtypes and formulas, and the same precision, fp32
inside and one rounding at the end. Orders of sums and approximations of elementary functions are
the library's, so bits depend on its version, on the CPU and on the layout. What is defined by
position or exact in any order (dropout, random numbers, counts) is canonical's own, so that both
arithmetics drop the same elements and start from the same weights.

Docstrings say only what differs from the function of the same name there.
"""

import torch
from torch import Tensor
from torch.nn import functional

from primitives.canonical import count_zeros, dropout, dropout_add, random_normal

__all__ = [
    "adam_step",
    "causal_softmax",
    "causal_softmax_backward",
    "count_zeros",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_loss",
    "cross_entropy_sums",
    "dropout",
    "dropout_add",
    "embedding",
    "embedding_backward",
    "erf",
    "exp",
    "gelu",
    "gelu_backward",
    "gelu_erf",
    "gelu_erf_backward",
    "gemm",
    "layer_norm",
    "layer_norm_backward",
    "log",
    "padded_softmax",
    "padded_softmax_backward",
    "random_normal",
    "row_sum",
    "softmax",
    "softmax_backward",
    "sqrt",
    "sum_of_squares",
    "tanh",
    "token_block_sum",
    "tree_sum",
    "vocabulary_max",
]


def gemm(
    a: Tensor,
    b: Tensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``torch.matmul``; the operands are widened to float32, because its result has their dtype.

    Only a plain product of bfloat16 to bfloat16 stays in the library's bfloat16 kernel, which sums
    in float32.
    """
    left, right = a.mT if transpose_a else a, b.mT if transpose_b else b
    plain = bias is None and alpha == 1.0
    if plain and a.dtype == b.dtype == out_dtype == torch.bfloat16:
        return torch.matmul(left, right)
    product = torch.matmul(left.float(), right.float())
    if alpha != 1.0:
        product *= alpha
    if bias is not None:
        product += bias.unsqueeze(-2)
    return product.to(out_dtype)


def tree_sum(
    x: Tensor,
    dim: int = 0,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``torch.sum`` in float32."""
    total = x.sum(dim, dtype=torch.float32)
    if bias is not None:
        total += bias
    return total.to(out_dtype)


def row_sum(x: Tensor) -> Tensor:
    """``torch.sum`` in float32."""
    return x.sum(-1, dtype=torch.float32)


def token_block_sum(dy: Tensor, num_blocks: int) -> Tensor:
    """``torch.sum`` in float32."""
    return dy.view(num_blocks, -1, dy.shape[-1]).sum(1, dtype=torch.float32)


def sum_of_squares(x: Tensor) -> Tensor:
    """``torch.sum`` of the squares."""
    return x.square().sum(-1)


def erf(x: Tensor) -> Tensor:
    """``torch.erf``."""
    return x.erf()


def exp(x: Tensor) -> Tensor:
    """``torch.exp``."""
    return x.exp()


def log(x: Tensor) -> Tensor:
    """``torch.log``."""
    return x.log()


def sqrt(x: Tensor) -> Tensor:
    """``torch.sqrt``."""
    return x.sqrt()


def tanh(x: Tensor) -> Tensor:
    """``torch.tanh``."""
    return x.tanh()


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.native_layer_norm``, which keeps mean and rstd in float32."""
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight.float(), bias.float(), eps)
    return y, mean.view(-1), rstd.view(-1)


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's native_layer_norm_backward for dx, ``torch.sum`` over the tokens of each block."""
    wide = weight.float()
    columns = mean[:, None], rstd[:, None]
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], *columns, wide, wide, [True, False, False]
    )
    normalized = (x - columns[0]).mul_(columns[1])
    return dx, token_block_sum(normalized.mul_(dy), num_blocks), token_block_sum(dy, num_blocks)


def gelu(x: Tensor) -> Tensor:
    """torch's GELU in its tanh form."""
    return functional.gelu(x, approximate="tanh")


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """torch's gelu_backward."""
    return _tensor(torch.ops.aten.gelu_backward(dy, x, approximate="tanh"))


def gelu_erf(x: Tensor) -> Tensor:
    """torch's GELU."""
    return functional.gelu(x)


def gelu_erf_backward(dy: Tensor, x: Tensor) -> Tensor:
    """torch's gelu_backward."""
    return _tensor(torch.ops.aten.gelu_backward(dy, x))


def softmax(scores: Tensor, scale: float = 1.0) -> Tensor:
    """``torch.softmax`` in float32."""
    return (scores.float() * scale).softmax(-1).to(scores.dtype)


def softmax_backward(dprobs: Tensor, probs: Tensor, scale: float = 1.0) -> Tensor:
    """torch's _softmax_backward_data in float32."""
    dscores = torch.ops.aten._softmax_backward_data(
        dprobs.float(), probs.float(), -1, torch.float32
    )
    return _tensor(dscores.mul_(scale).to(probs.dtype))


def causal_softmax(scores: Tensor, scale: float) -> Tensor:
    """``torch.softmax`` in float32 over masked scores."""
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
    return _masked_softmax(scores, hidden, scale)


def causal_softmax_backward(dprobs: Tensor, probs: Tensor, scale: float) -> Tensor:
    """As ``softmax_backward``; hidden columns have probability 0."""
    return softmax_backward(dprobs, probs, scale)


def padded_softmax(scores: Tensor, visible: Tensor, scale: float) -> Tensor:
    """``torch.softmax`` in float32 over masked scores."""
    hidden = torch.arange(scores.shape[-1]) >= visible[:, None, None]
    return _masked_softmax(scores, hidden, scale)


def padded_softmax_backward(dprobs: Tensor, probs: Tensor, visible: Tensor, scale: float) -> Tensor:
    """As ``softmax_backward``; hidden columns have probability 0."""
    return softmax_backward(dprobs, probs, scale)


def _masked_softmax(scores: Tensor, hidden: Tensor, scale: float) -> Tensor:
    wide = (scores.float() * scale).masked_fill_(hidden, -torch.inf)
    return wide.softmax(-1).to(scores.dtype)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """torch's embedding."""
    return functional.embedding(ids, weight.flatten(0, 1))


def embedding_backward(dy: Tensor, ids: Tensor, vocab_shape: tuple[int, int, int]) -> Tensor:
    """torch's embedding_dense_backward in float32."""
    num_rows = vocab_shape[0] * vocab_shape[1]
    rows = torch.ops.aten.embedding_dense_backward(dy.float(), ids, num_rows, -1, False)
    return _tensor(rows.view(vocab_shape))


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From this module's other functions, as the canonical one."""
    largest = vocabulary_max(logits)
    sum_exp, target_logit = cross_entropy_sums(logits, targets, largest)
    return cross_entropy_loss(largest, sum_exp, target_logit), largest, sum_exp


def vocabulary_max(logits: Tensor) -> Tensor:
    """``torch.amax``."""
    return logits.amax((0, 2)).float()


def cross_entropy_sums(
    logits: Tensor,
    targets: Tensor,
    max: Tensor,
    first: int = 0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.exp`` and ``torch.sum`` in float32."""
    sum_exp = (logits.float() - max[:, None]).exp_().sum((0, 2))
    part, column, here = _places(targets, logits, first)
    picked = logits[part, torch.arange(len(targets)), column].float()
    return sum_exp, picked.masked_fill_(~here, 0.0)


def cross_entropy_loss(max: Tensor, sum_exp: Tensor, target_logit: Tensor) -> Tensor:
    """With ``torch.log``."""
    return sum_exp.log() - (target_logit - max)


def cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    max: Tensor,
    sum_exp: Tensor,
    grad_loss: Tensor,
    first: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """With ``torch.exp``, in float32."""
    probs = (logits.float() - max[:, None]).exp_().div_(sum_exp[:, None])
    part, column, here = _places(targets, logits, first)
    probs[part, torch.arange(len(targets)), column] -= here.float()
    return probs.mul_(grad_loss[:, None]).to(logits.dtype)


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2_sqrt: float,
) -> None:
    """The operators of ``torch.optim.AdamW`` for one tensor."""
    param.mul_(1.0 - lr * weight_decay)
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    divisor = exp_avg_sq.sqrt().div_(bias_correction2_sqrt).add_(eps)
    param.addcdiv_(exp_avg, divisor, value=-lr / bias_correction1)


def _places(targets: Tensor, logits: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T] each: part and column of each target in these logits, and whether it is in them.

    A target that is elsewhere gets part 0 and column 0.
    """
    parts, _, width = logits.shape
    local = targets - first
    here = (local >= 0) & (local < parts * width)
    local = local * here
    return local // width, local % width, here


def _tensor(result: Tensor) -> Tensor:
    """Gives the untyped result of ``torch.ops`` its type."""
    return result
