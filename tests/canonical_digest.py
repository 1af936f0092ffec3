"""Prints one SHA-256 per canonical kernel, as JSON: run once per instruction set and compared.

The inputs cover odd sizes, every dtype, several blocks of gemm, inf, nan and subnormals.
"""

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from primitives import _C, canonical


def inputs(dtype: torch.dtype, *shape: int, seed: int = 0, special: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    # Exact arithmetic only, so that the inputs do not depend on the CPU either.
    x = bits.double() / 2**30
    if special:
        pick = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-41, 3e38])
        where = bits % 37 == 0
        x = torch.where(where, pick[(bits // 37) % 6].double(), x)
    return x.to(dtype)


def results() -> Iterator[tuple[str, Tensor]]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for special in (False, True):
            for size in (5, 33, 77):

                def x(*shape: int, seed: int = 0) -> Tensor:
                    return inputs(dtype, *shape, seed=seed, special=special)  # noqa: B023

                yield from layers(x, size, dtype)
            a = inputs(dtype, 2, 150, 530, special=special)
            b = inputs(dtype, 2, 530, 490, seed=1, special=special)
            bias = inputs(dtype, 490, seed=2)
            for out in (torch.float32, dtype):
                yield "gemm", canonical.gemm(a, b, bias=bias, alpha=0.3, out_dtype=out)
                t = canonical.gemm(a.mT.contiguous(), b.mT.contiguous(), transpose_a=True,
                                   transpose_b=True, out_dtype=out)  # fmt: skip
                yield "gemm transposed", t
    bits = torch.arange(-(2**31), 2**31, 40009, dtype=torch.int64).to(torch.int32)
    everywhere = bits.view(torch.float32)
    for name in ("exp", "log", "sqrt", "tanh", "erf", "sigmoid", "rsqrt"):
        yield name, getattr(canonical, name)(everywhere)
    for dtype in (torch.float16, torch.bfloat16):
        yield f"store {dtype}", canonical.tree_sum(everywhere[None], out_dtype=dtype)
        halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        yield f"load {dtype}", canonical.tree_sum(halves[None])
    yield "random_normal", canonical.random_normal((1001,), 2**63 + 5, 2**32 - 500)
    yield "random_words", _C.canonical_random_words(1001, 2**63 + 5, 2**33 + 1)
    p, g, m = (inputs(torch.float32, 1001, seed=i) for i in range(3))
    v = m * m
    canonical.adam_step(p, g, m, v, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
                        bias_correction1=0.1, bias_correction2_sqrt=0.2)  # fmt: skip
    yield "adam_step", torch.stack([p, m, v])


def layers(x, n: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    yield "tree_sum", canonical.tree_sum(x(n, 3, n), bias=x(n, seed=1), out_dtype=dtype)
    yield "row_sum", canonical.row_sum(x(3, n))
    yield "sum_of_squares", canonical.sum_of_squares(x(3, n).float())
    yield "token_block_sum", canonical.token_block_sum(x(2 * n, n), 2)
    yield "count_zeros", torch.tensor(canonical.count_zeros(x(n, n)))
    y, mean, rstd = canonical.layer_norm(x(4, n), x(n, seed=1), x(n, seed=2), 1e-5)
    yield from (("layer_norm", t) for t in (y, mean, rstd))
    backward = canonical.layer_norm_backward(x(4, n, seed=3), x(4, n), mean, rstd, x(n, seed=1), 2)
    yield from (("layer_norm_backward", t) for t in backward)
    y, rstd = canonical.rms_norm(x(4, n), x(n, seed=1), 1e-5)
    yield from (("rms_norm", t) for t in (y, rstd))
    backward = canonical.rms_norm_backward(x(4, n, seed=3), x(4, n), rstd, x(n, seed=1), 2)
    yield from (("rms_norm_backward", t) for t in backward)
    yield "gelu", canonical.gelu(x(n, n) * 4)
    yield "gelu_backward", canonical.gelu_backward(x(n, n, seed=1), x(n, n) * 4)
    yield "gelu_erf", canonical.gelu_erf(x(n, n) * 4)
    yield "gelu_erf_backward", canonical.gelu_erf_backward(x(n, n, seed=1), x(n, n) * 4)
    yield "silu", canonical.silu(x(n, n) * 40)
    yield "silu_backward", canonical.silu_backward(x(n, n, seed=1), x(n, n) * 40)
    yield "swiglu", canonical.swiglu(x(n, n) * 4, x(n, n, seed=1))
    gradients = canonical.swiglu_backward(x(n, n, seed=2), x(n, n) * 4, x(n, n, seed=1))
    yield from (("swiglu_backward", t) for t in gradients)
    probs = canonical.softmax(x(7, n), 0.3)
    yield "softmax", probs
    yield "softmax_backward", canonical.softmax_backward(x(7, n, seed=1), probs, 0.3)
    visible = torch.tensor([1, n // 2])
    padded = canonical.padded_softmax(x(2, n, n), visible, 0.3)
    yield "padded_softmax", padded
    gradient = canonical.padded_softmax_backward(x(2, n, n, seed=1), padded, visible, 0.3)
    yield "padded_softmax_backward", gradient
    probs = canonical.causal_softmax(x(2, n, n), 0.3)
    yield "causal_softmax", probs
    gradient = canonical.causal_softmax_backward(x(2, n, n, seed=1), probs, 0.3)
    yield "causal_softmax_backward", gradient
    targets = torch.arange(6) * 7 % (3 * n)
    loss, largest, total = canonical.cross_entropy(x(3, 6, n), targets)
    yield from (("cross_entropy", t) for t in (loss, largest, total))
    dlogits = canonical.cross_entropy_backward(x(3, 6, n), targets, largest, total, loss)
    yield "cross_entropy_backward", dlogits
    table = canonical.embedding_backward(x(6, n), targets % 4, (2, 2, n))
    yield "embedding_backward", table
    rows = torch.tensor([0, 5, -1, 2**40])
    yield "dropout", canonical.dropout(x(4, n), 0.4, 99, rows)
    yield "dropout_add", canonical.dropout_add(x(4, n), x(4, n, seed=1), 0.4, 99, rows)


if __name__ == "__main__":
    digests: dict[str, "hashlib._Hash"] = {}
    for kernel, tensor in results():
        words = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.view(1)
        digests.setdefault(kernel, hashlib.sha256()).update(words.numpy().tobytes())
    print(json.dumps({"isa": _C.active_isa()} | {k: d.hexdigest() for k, d in digests.items()}))
