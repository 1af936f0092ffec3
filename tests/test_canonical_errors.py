"""Wrong arguments of the canonical kernels: one ValueError that says what, expected and got."""

from collections.abc import Callable

import pytest
import torch

from primitives import canonical

X = torch.zeros(4, 6)
SCORES = torch.zeros(2, 5, 5)
LOGITS = torch.zeros(2, 4, 3)
IDS = torch.zeros(4, dtype=torch.int64)
ROW = torch.zeros(4)

CASES: list[tuple[Callable[[], object], str]] = [
    (lambda: canonical.gemm(X, X), r"gemm: b must be k = 6 long like a \[4, 6\], got \[4, 6\]"),
    (lambda: canonical.gemm(X, ROW), r"gemm: b must be 2- or 3-dimensional, got shape \[4\]"),
    (lambda: canonical.gemm(X, X.T), "gemm: b must be stored with contiguous rows"),
    (lambda: canonical.gemm(X.double(), X, transpose_b=True), "gemm: a must be float32, float16"),
    (
        lambda: canonical.gemm(X.expand(2, 4, 6), torch.zeros(3, 6, 2)),
        r"gemm: b must be 2 batches like a, got \[3, 6, 2\]",
    ),
    (
        lambda: canonical.gemm(X, X, transpose_b=True, bias=torch.zeros(5)),
        r"gemm: bias must be of shape \[4\], got \[5\]",
    ),
    (
        lambda: canonical.gemm(X, X, transpose_b=True, out_dtype=torch.int32),
        "gemm: out_dtype must be float32, float16 or bfloat16, got Int",
    ),
    (lambda: canonical.tree_sum(X, 2), "tree_sum: x must be of more than 2 dimensions"),
    (lambda: canonical.tree_sum(X.T), "tree_sum: x must be contiguous"),
    (lambda: canonical.tree_sum(X, 1, bias=ROW), "tree_sum: bias must be None when the last dim"),
    (lambda: canonical.tree_sum(X, 0, bias=ROW), r"tree_sum: bias must be of shape \[6\]"),
    (lambda: canonical.token_block_sum(X, 3), "whole number of tokens in each of 3 blocks"),
    (lambda: canonical.sum_of_squares(X.half()), "sum_of_squares: x must be Float, got Half"),
    (lambda: canonical.sigmoid(X.half()), "x must be Float, got Half"),
    (lambda: canonical.rsqrt(X.T), "x must be contiguous"),
    (lambda: canonical.exp(X.double()), "x must be Float, got Double"),
    (lambda: canonical.layer_norm(X, ROW, ROW, 1e-5), r"weight must be of shape \[6\], got \[4\]"),
    (
        lambda: canonical.layer_norm_backward(X.half(), X, ROW, ROW, X[0], 2),
        "layer_norm_backward: dy must be Float, got Half",
    ),
    (
        lambda: canonical.layer_norm_backward(X, X, ROW, ROW, X[0], 3),
        "layer_norm_backward: x must be a whole number of tokens in each of 3 blocks",
    ),
    (
        lambda: canonical.rms_norm(X, ROW, 1e-5),
        r"rms_norm: weight must be of shape \[6\], got \[4\]",
    ),
    (
        lambda: canonical.rms_norm(X[:, :0], ROW, 1e-5),
        "rms_norm: x must be of a hidden size above 0",
    ),
    (lambda: canonical.rms_norm(ROW, ROW, 1e-5), "rms_norm: x must be 2-dimensional"),
    (
        lambda: canonical.rms_norm_backward(X.half(), X, ROW, X[0], 2),
        "rms_norm_backward: dy must be Float, got Half",
    ),
    (
        lambda: canonical.rms_norm_backward(X, X, ROW[:2], X[0], 2),
        r"rms_norm_backward: rstd must be of shape \[4\], got \[2\]",
    ),
    (
        lambda: canonical.rms_norm_backward(X, X, ROW, X[0], 0),
        "rms_norm_backward: x must be a whole number of tokens in each of 0 blocks",
    ),
    (lambda: canonical.silu(IDS), "silu: x must be float32, float16 or bfloat16, got Long"),
    (lambda: canonical.silu_backward(X.half(), X), "silu_backward: dy must be Float, got Half"),
    (lambda: canonical.swiglu(X, X[:2]), r"swiglu: value must be of shape \[4, 6\], got \[2, 6\]"),
    (lambda: canonical.swiglu(X.T, X.T), "swiglu: gate must be contiguous"),
    (
        lambda: canonical.swiglu_backward(X, X, X.bfloat16()),
        "swiglu_backward: value must be Float, got BFloat16",
    ),
    (lambda: canonical.softmax(X.T), "softmax: scores must be contiguous"),
    (lambda: canonical.softmax(torch.tensor(1.0)), "softmax: scores must be at least 1-dim"),
    (
        lambda: canonical.softmax_backward(X[:2], X),
        r"softmax_backward: dprobs must be of shape \[4, 6\], got \[2, 6\]",
    ),
    (lambda: canonical.gelu(X.T), "gelu: x must be contiguous"),
    (lambda: canonical.gelu_backward(ROW, X), r"gelu_backward: dy must be of shape \[4, 6\]"),
    (lambda: canonical.causal_softmax(LOGITS, 1.0), r"scores must be \[N, S, S\], got \[2, 4, 3\]"),
    (
        lambda: canonical.causal_softmax_backward(SCORES[:1], SCORES, 1.0),
        r"dprobs must be of shape \[2, 5, 5\], got \[1, 5, 5\]",
    ),
    (
        lambda: canonical.padded_softmax(SCORES, IDS[:2], 1.0),
        r"padded_softmax: visible must be in \[1, 5\], got 0 at position 0",
    ),
    (
        lambda: canonical.padded_softmax_backward(SCORES, SCORES, IDS[:2] + 6, 1.0),
        r"padded_softmax_backward: visible must be in \[1, 5\], got 6 at position 0",
    ),
    (lambda: canonical.padded_softmax(SCORES, IDS, 1.0), r"visible must be of shape \[2\], got"),
    (lambda: canonical.gelu_erf(X.T), "gelu_erf: x must be contiguous"),
    (lambda: canonical.embedding(IDS + 8, LOGITS), r"embedding: ids must be in \[0, 8\), got 8"),
    (lambda: canonical.embedding(IDS - 1, LOGITS), r"in \[0, 8\), got -1 at position 0"),
    (
        lambda: canonical.embedding_backward(X, IDS, (2, 3, 5)),
        r"embedding_backward: dy must be of shape \[4, 5\], got \[4, 6\]",
    ),
    (lambda: canonical.cross_entropy(LOGITS, IDS + 6), r"in \[0, 6\), got 6 at position 0"),
    (lambda: canonical.cross_entropy(LOGITS, ROW), "targets must be Long, got Float"),
    (
        lambda: canonical.cross_entropy_backward(LOGITS, IDS, ROW, ROW, ROW[:2]),
        r"grad_loss must be of shape \[4\], got \[2\]",
    ),
    (lambda: canonical.random_normal((2,), -1), r"key must be in \[0, 2\^64\), got -1"),
    (lambda: canonical.random_normal((2,), 0, 2**64), "first_index must be in"),
    (lambda: canonical.dropout(X, 1.0, 0, IDS), r"dropout: probability must be in \[0, 1\), got 1"),
    (lambda: canonical.dropout(X, float("nan"), 0, IDS), "dropout: probability must be in"),
    (lambda: canonical.dropout(X, 0.1, 0, IDS[:2]), r"row_ids must be of shape \[4\], got \[2\]"),
    (
        lambda: canonical.dropout_add(X, X.half(), 0.1, 0, IDS),
        "dropout_add: residual must be Float, got Half",
    ),
    (lambda: canonical.count_zeros(IDS), "count_zeros: x must be float32, float16 or bfloat16"),
    (lambda: canonical.gelu(X.to("meta")), "gelu: x must be a dense CPU tensor, got meta"),
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_a_wrong_argument_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_adam_step_refuses_a_gradient_of_another_shape() -> None:
    hyper = dict.fromkeys(["lr", "beta1", "beta2", "eps", "weight_decay"], 0.1)
    hyper |= {"bias_correction1": 1.0, "bias_correction2_sqrt": 1.0}
    with pytest.raises(ValueError, match=r"adam_step: grad must be of shape \[4\], got \[3\]"):
        canonical.adam_step(ROW.clone(), ROW[:3], ROW.clone(), ROW.clone(), **hyper)
