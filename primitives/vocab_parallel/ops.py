"""The operator ``primitives::vocab_entropy`` and what a trace needs to know of its results.

It is made, with its backward, in csrc/bindings/vocab_entropy_op.cpp.
"""

from typing import Any

import torch
from torch import Tensor

import primitives._C  # noqa: F401  registers it

vocab_entropy = torch.ops.primitives.vocab_entropy.default
"""entropy, log_prob, log_sum_exp [...] and the quads [..., 4] that the backward needs."""


def _fake_forward(logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    shape = logits.shape[:-1]
    results = (logits.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return *results, logits.new_empty((*shape, 4), dtype=torch.float32)


def _fake_backward(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_backward_in_place(logits: Tensor, *_: Any, **__: Any) -> None:
    return None


torch.library.register_fake("primitives::vocab_entropy", _fake_forward)
torch.library.register_fake("primitives::vocab_entropy_backward", _fake_backward)
torch.library.register_fake("primitives::vocab_entropy_backward_", _fake_backward_in_place)
