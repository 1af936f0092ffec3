"""Canonical kernels: floating-point results defined by formula and order alone.

Every function gives the same bits on AVX-512, AVX2 and plain x86-64, for every thread and every
layout that respects the order of its sums. Formulas, orders and measured errors:
docs/canonical-arithmetic.md.

Conventions. Tensors are dense and contiguous unless said otherwise, on the CPU or all on one CUDA
device, with the same bits; there kernels are enqueued on the current stream, and functions that
check int64 arguments (ids, targets, visible) wait for them. "T" is float32, float16 or bfloat16;
all inner arithmetic is float32, with one rounding to nearest even at the end. Every NaN in a result
is one NaN (0x7fc00000 in float32). "The tree" sums adjacent pairs level by level, an odd last
element carried up. Every function raises ValueError for a wrong shape, dtype, device or memory
layout.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import primitives._C as _C

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
    "rms_norm",
    "rms_norm_backward",
    "row_sum",
    "rsqrt",
    "sigmoid",
    "silu",
    "silu_backward",
    "softmax",
    "softmax_backward",
    "sqrt",
    "sum_of_squares",
    "swiglu",
    "swiglu_backward",
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
    """The matrix product ``alpha * a b + bias``, each output element one chain of fma over k.

    Args:
        a: [B, M, K] of T, or [M, K] shared by all batches ([.., K, M] with ``transpose_a``).
            Elements of a row must be adjacent; rows and batches may have any stride.
        b: [B, K, N] of T, or [K, N] ([.., N, K] with ``transpose_b``); strides as for ``a``.
        bias: [B, N] or [N] of T, or None.
        alpha: factor, applied in float32.
        out_dtype: T of the result.

    Returns:
        [B, M, N], or [M, N] when ``a`` and ``b`` are both matrices.

    Numerics: c = 0; c = fma(a[m, k], b[k, n], c) for k = 0, 1, ...; then c * alpha (left out when
    alpha is 1), then c + bias, then one rounding.
    """
    return _C.canonical_gemm(a, b, transpose_a, transpose_b, bias, alpha, out_dtype)


def tree_sum(
    x: Tensor,
    dim: int = 0,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The sum of ``x`` along ``dim`` by the tree.

    Args:
        x: any shape, of T.
        dim: the dimension to sum away.
        bias: [n] of T, n the last dimension, added after the tree; not when ``dim`` is the last.
        out_dtype: T of the result.

    Returns:
        x's shape without ``dim``. The sum of nothing is +0.

    Numerics: tree in float32, then + bias, then one rounding.
    """
    return _C.canonical_tree_sum(x, dim, bias, out_dtype)


def row_sum(x: Tensor) -> Tensor:
    """The sum of each row (last dimension) of ``x`` [..., n] of T by the tree, as float32 [...]."""
    return _C.canonical_tree_sum(x, -1, None, torch.float32)


def token_block_sum(dy: Tensor, num_blocks: int) -> Tensor:
    """The sums over ``num_blocks`` equal runs of tokens, each by the tree.

    Args:
        dy: [tokens, n] of T.
        num_blocks: divides the number of tokens.

    Returns:
        [num_blocks, n] float32.
    """
    return _C.canonical_token_block_sum(dy, num_blocks)


def sum_of_squares(x: Tensor) -> Tensor:
    """The tree over x * x along the last dimension of ``x`` [..., m] float32, as float32 [...]."""
    return _C.canonical_sum_of_squares(x)


def count_zeros(x: Tensor) -> int:
    """How many elements of ``x`` (any shape, of T) are +0 or -0."""
    return _C.canonical_count_zeros(x)


def exp(x: Tensor) -> Tensor:
    """exp of each element of ``x`` (float32), through the subnormals to 0 and up to inf."""
    return _C.canonical_exp(x)


def log(x: Tensor) -> Tensor:
    """The natural logarithm of each element of ``x`` (float32): -inf at 0, NaN below."""
    return _C.canonical_log(x)


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of each element of ``x`` (float32)."""
    return _C.canonical_sqrt(x)


def tanh(x: Tensor) -> Tensor:
    """tanh of each element of ``x`` (float32), as a new tensor."""
    return _C.canonical_tanh(x)


def erf(x: Tensor) -> Tensor:
    """The error function of each element of ``x`` (float32), as a new tensor."""
    return _C.canonical_erf(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) of each element of ``x`` (float32), through the subnormals to 0."""
    return _C.canonical_sigmoid(x)


def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x) of each element of ``x`` (float32): inf at +0, -inf at -0, NaN below."""
    return _C.canonical_rsqrt(x)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension.

    Args:
        x: [tokens, h] of T.
        weight, bias: [h] of T.
        eps: added to the variance.

    Returns:
        y like x; mean and rstd, [tokens] float32, for the backward pass.

    Numerics: mean = tree(x) / h; d = x - mean; rstd = 1 / sqrt(tree(d * d) / h + eps);
    y = fma(d * rstd, weight, bias).
    """
    return _C.canonical_layer_norm(x, weight, bias, eps)


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``layer_norm``.

    Args:
        dy, x: [tokens, h] of one T.
        mean, rstd: [tokens] float32, as ``layer_norm`` returned them.
        weight: [h] of T.
        num_blocks: equal runs of tokens to sum separately; divides tokens.

    Returns:
        dx like x; dweight and dbias, [num_blocks, h] float32.

    Numerics: n = (x - mean) * rstd; g = dy * weight; a = tree(g) / h; c = tree(g * n) / h;
    dx = fma(n, -c, g - a) * rstd; dweight = tree(dy * n) and dbias = tree(dy) over each block's
    tokens.
    """
    return _C.canonical_layer_norm_backward(dy, x, mean, rstd, weight, num_blocks)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension.

    Args:
        x: [tokens, h] of T.
        weight: [h] of T.
        eps: added to the mean square.

    Returns:
        y like x; rstd, [tokens] float32, for the backward pass.

    Numerics: rstd = 1 / sqrt(tree(x * x) / h + eps); y = (x * rstd) * weight.

    Source: Zhang and Sennrich, "Root mean square layer normalization", NeurIPS 2019.
    """
    return _C.canonical_rms_norm(x, weight, eps)


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """The gradients of ``rms_norm``.

    Args:
        dy, x: [tokens, h] of one T.
        rstd: [tokens] float32, as ``rms_norm`` returned it.
        weight: [h] of T.
        num_blocks: equal runs of tokens to sum separately; divides tokens.

    Returns:
        dx like x; dweight, [num_blocks, h] float32.

    Numerics: n = x * rstd; g = dy * weight; c = tree(g * n) / h; dx = fma(n, -c, g) * rstd;
    dweight = tree(dy * n) over each block's tokens.
    """
    return _C.canonical_rms_norm_backward(dy, x, rstd, weight, num_blocks)


def gelu(x: Tensor) -> Tensor:
    """x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), GELU in its tanh form, of ``x`` of T."""
    return _C.canonical_gelu(x)


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``gelu`` at ``x`` times ``dy`` (both of one T), like x."""
    return _C.canonical_gelu_backward(dy, x)


def gelu_erf(x: Tensor) -> Tensor:
    """x * (1 + erf(x / sqrt(2))) / 2, GELU without approximation, of ``x`` of T."""
    return _C.canonical_gelu_erf(x)


def gelu_erf_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``gelu_erf`` at ``x`` times ``dy`` (both of one T), like x."""
    return _C.canonical_gelu_erf_backward(dy, x)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) of ``x`` of T."""
    return _C.canonical_silu(x)


def silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``silu`` at ``x`` times ``dy`` (both of one T), like x."""
    return _C.canonical_silu_backward(dy, x)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value with one rounding (both of one T and shape), like gate.

    Source: Shazeer, "GLU variants improve transformer", 2020.
    """
    return _C.canonical_swiglu(gate, value)


def swiglu_backward(dy: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``swiglu``.

    Args:
        dy, gate, value: of one T and shape.

    Returns:
        dgate = (dy * value) * silu'(gate) and dvalue = dy * silu(gate), like gate.
    """
    return _C.canonical_swiglu_backward(dy, gate, value)


def softmax(scores: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale * scores) over the last dimension.

    Args:
        scores: [..., n] of T.
        scale: factor, applied in float32.

    Returns:
        Probabilities like scores.

    Numerics: z = scale * s; m = max z; e = exp(z - m); p = e * (1 / tree(e)).
    """
    return _C.canonical_softmax(scores, scale)


def softmax_backward(dprobs: Tensor, probs: Tensor, scale: float = 1.0) -> Tensor:
    """The gradient of ``softmax``.

    Args:
        dprobs, probs: [..., n] of one T.
        scale: as in the forward pass.

    Returns:
        dscores like probs.

    Numerics: (p * (dp - tree(p * dp))) * scale.
    """
    return _C.canonical_softmax_backward(dprobs, probs, scale)


def causal_softmax(scores: Tensor, scale: float) -> Tensor:
    """softmax(scale * scores) of each row i over the columns j <= i, exactly 0 for j > i.

    Args:
        scores: [N, S, S] of T.
        scale: factor, applied in float32.

    Returns:
        Probabilities like scores.

    Numerics: z = scale * s; m = max z; e = exp(z - m), +0 for j > i; p = e * (1 / tree(e)), the
    tree over all S columns.
    """
    return _C.canonical_causal_softmax(scores, scale)


def causal_softmax_backward(dprobs: Tensor, probs: Tensor, scale: float) -> Tensor:
    """The gradient of ``causal_softmax``.

    Args:
        dprobs, probs: [N, S, S] of one T.
        scale: as in the forward pass.

    Returns:
        dscores like probs, exactly +0 for j > i.

    Numerics: (p * (dp - tree(p * dp))) * scale.
    """
    return _C.canonical_causal_softmax_backward(dprobs, probs, scale)


def padded_softmax(scores: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(scale * scores) over the first columns of each row, exactly 0 in the others.

    Args:
        scores: [N, S, S] of T.
        visible: [N] int64 in [1, S]: how many columns all rows of a matrix see.
        scale: factor, applied in float32.

    Returns:
        Probabilities like scores.

    Numerics: as ``causal_softmax``, with j < visible in place of j <= i.
    """
    return _C.canonical_padded_softmax(scores, visible, scale)


def padded_softmax_backward(dprobs: Tensor, probs: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The gradient of ``padded_softmax``.

    Args:
        dprobs, probs: [N, S, S] of one T.
        visible, scale: as in the forward pass.

    Returns:
        dscores like probs, exactly +0 for j >= visible.

    Numerics: (p * (dp - tree(p * dp))) * scale.
    """
    return _C.canonical_padded_softmax_backward(dprobs, probs, visible, scale)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """The rows ``ids`` ([tokens] int64) of ``weight`` ([C, V/C, h] of T), as [tokens, h]."""
    return _C.canonical_embedding(ids, weight)


def embedding_backward(dy: Tensor, ids: Tensor, vocab_shape: tuple[int, int, int]) -> Tensor:
    """The gradient of ``embedding``: each token's row added in token order.

    Args:
        dy: [tokens, h] of T.
        ids: [tokens] int64.
        vocab_shape: (C, V/C, h) of the weight.

    Returns:
        [C, V/C, h] float32.
    """
    return _C.canonical_embedding_backward(dy, ids, vocab_shape)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token over a vocabulary in C parts, all of them here.

    Args:
        logits: [C, tokens, V/C] of T.
        targets: [tokens] int64 in [0, V).

    Returns:
        loss, max and sum_exp, each [tokens] float32; the last two for the backward pass.

    Numerics: m = max z; e = exp(z - m); sum_exp = tree over the parts of the tree over a part's
    row; loss = log(sum_exp) - (z[target] - m).
    """
    largest = vocabulary_max(logits)
    sum_exp, target_logit = cross_entropy_sums(logits, targets, largest)
    return cross_entropy_loss(largest, sum_exp, target_logit), largest, sum_exp


def vocabulary_max(logits: Tensor) -> Tensor:
    """The largest logit of each token, [tokens] float32, over ``logits`` [C, tokens, V/C] of T."""
    return _C.canonical_vocabulary_max(logits)


def cross_entropy_sums(
    logits: Tensor,
    targets: Tensor,
    max: Tensor,
    first: int = 0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``cross_entropy_loss`` needs, over a run of the vocabulary's parts.

    Args:
        logits: [parts, tokens, V/C] of T.
        targets: [tokens] int64 in [0, vocab_size).
        max: [tokens] float32, over the whole vocabulary.
        first: vocabulary index of the first of these logits.
        vocab_size: of all parts; default: there are no others.

    Returns:
        sum_exp and target_logit, [tokens] float32; the latter is 0 where the target is elsewhere.
        The tree over shards finishes sum_exp, and any sum over them target_logit.
    """
    return _C.canonical_cross_entropy_sums(
        logits, targets, max, first, _vocab_size(logits, vocab_size)
    )


def cross_entropy_loss(max: Tensor, sum_exp: Tensor, target_logit: Tensor) -> Tensor:
    """log(sum_exp) - (target_logit - max), each [tokens] float32."""
    loss = log(sum_exp) - (target_logit - max)
    return loss.masked_fill_(loss.isnan(), math.nan)


def cross_entropy_backward(
    logits: Tensor,
    targets: Tensor,
    max: Tensor,
    sum_exp: Tensor,
    grad_loss: Tensor,
    first: int = 0,
    vocab_size: int | None = None,
) -> Tensor:
    """The gradient of ``cross_entropy`` for these logits.

    Args:
        logits, targets, first, vocab_size: as in ``cross_entropy_sums``.
        max, sum_exp: [tokens] float32, over the whole vocabulary.
        grad_loss: [tokens] float32.

    Returns:
        dlogits like logits.

    Numerics: (exp(z - m) * (1 / sum_exp) - [target]) * grad_loss.
    """
    return _C.canonical_cross_entropy_backward(
        logits, targets, max, sum_exp, grad_loss, first, _vocab_size(logits, vocab_size)
    )


def random_normal(shape: Sequence[int], key: int, first_index: int = 0) -> Tensor:
    """Standard normal numbers (sums of twelve uniforms) keyed by position, on the CPU.

    Args:
        shape: shape of the result.
        key: 64-bit key.
        first_index: global index of the first element; a shard asks for its own part of the full
            tensor.

    Returns:
        float32, exact: element i is (sum of 12 halves of Philox words - 393210) / 65536.
    """
    _check_word("random_normal", "key", key)
    _check_word("random_normal", "first_index", first_index)
    return _C.canonical_random_normal(list(shape), key, first_index)


def dropout(x: Tensor, probability: float, key: int, row_ids: Tensor) -> Tensor:
    """Each element dropped with ``probability``, the others scaled; backward: the same call on dy.

    Args:
        x: [R, W] of T.
        probability: in [0, 1).
        key: 64-bit key.
        row_ids: [R] int64, the global number of each row; keeps the mask independent of the layout.

    Returns:
        Like x: x * float32(1 / (1 - probability)) where kept, +0 elsewhere.

    Numerics: (r, c) is kept iff word c % 4 of Philox(key, (c // 4, 0, row_ids[r])) >= floor(p *
    2^32).
    """
    _check_word("dropout", "key", key)
    return _C.canonical_dropout(x, None, probability, key, row_ids)


def dropout_add(
    y: Tensor, residual: Tensor, probability: float, key: int, row_ids: Tensor
) -> Tensor:
    """``residual + dropout(y)`` with one rounding; the other arguments as in ``dropout``.

    Args:
        y, residual: [R, W] of one T.

    Returns:
        Like y.
    """
    _check_word("dropout_add", "key", key)
    return _C.canonical_dropout(y, residual, probability, key, row_ids)


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
    """One AdamW step, in place on ``param``, ``exp_avg`` and ``exp_avg_sq``.

    Args:
        param, grad, exp_avg, exp_avg_sq: float32, one shape.
        bias_correction1: 1 - beta1^step.
        bias_correction2_sqrt: sqrt(1 - beta2^step).

    Numerics: 1 - beta, 1 - lr * weight_decay and lr / bias_correction1 in float64, rounded to
    float32 once. m = fma(g, 1 - beta1, m * beta1); v = fma(g * g, 1 - beta2, v * beta2); param =
    fma(m / (sqrt(v) / bias_correction2_sqrt + eps), -lr / bias_correction1, param * (1 - lr *
    weight_decay)).

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    _C.canonical_adam_step(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        bias_correction1,
        bias_correction2_sqrt,
    )


def _check_word(function: str, name: str, value: int) -> None:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{function}: {name} must be in [0, 2^64), got {value}")


def _vocab_size(logits: Tensor, vocab_size: int | None) -> int:
    if vocab_size is None and logits.dim() == 3:
        return logits.shape[0] * logits.shape[2]
    return vocab_size or 0
