"""The operator ``primitives::vocab_entropy`` and what a trace needs to know of its results.

It is made, with its backward, in csrc/bindings/vocab_entropy_op.cpp.
"""

from typing import Any

import torch
from torch import Tensor

import primitives._C  # noqa: F401  registers it

vocab_entropy = torch.ops.primitives.vocab_entropy.default
"""entropy, log_prob, log_sum_exp [...] and the quads [..., 4] that the backward needs."""


@torch.library.register_fake("primitives::vocab_entropy")
def _(logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = logits.shape[:-1]
    results = (logits.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return *results, logits.new_empty((*shape, 4), dtype=torch.float32)  # type: ignore[return-value]


@torch.library.register_fake("primitives::vocab_entropy_backward")
def _(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("primitives::vocab_entropy_backward_")
def _(logits: Tensor, *_: Any, **__: Any) -> None:
    pass
