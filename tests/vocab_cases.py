"""Logits of every kind, and the ranks of a split vocabulary in one process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from primitives import _C
from primitives._C import VocabShard

INF = float("inf")
IGNORED = -100


def _one(shape: tuple[int, int], g: torch.Generator, value: float, base: float) -> Tensor:
    z = torch.full(shape, base)
    z[torch.arange(shape[0]), torch.randint(shape[1], (shape[0],), generator=g)] = value
    return z


def _masked(shape: tuple[int, int], g: torch.Generator, share: float) -> Tensor:
    z = torch.randn(shape, generator=g) * 3
    return z.masked_fill(torch.rand(shape, generator=g) < share, -INF)


def _with(shape: tuple[int, int], g: torch.Generator, value: float, base: Tensor) -> Tensor:
    z = base.clone()
    z[torch.arange(shape[0]), torch.randint(shape[1], (shape[0],), generator=g)] = value
    return z


def _half_masked_nan(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    z = torch.full(shape, -INF)
    z[:, shape[1] // 2] = 1
    return _with(shape, g, float("nan"), z)


def _uniform(shape: tuple[int, int], g: torch.Generator, low: float, high: float) -> Tensor:
    return torch.rand(shape, generator=g) * (high - low) + low


def _normal(shape: tuple[int, int], g: torch.Generator, scale: float, mean: float = 0) -> Tensor:
    return torch.randn(shape, generator=g) * scale + mean


Family = Callable[[tuple[int, int], torch.Generator], Tensor]
FAMILIES: dict[str, Family] = {
    "normal": lambda s, g: _normal(s, g, 1),
    "normal 5": lambda s, g: _normal(s, g, 5),
    "normal 100": lambda s, g: _normal(s, g, 100),
    "near 1e4": lambda s, g: _normal(s, g, 4, 1e4),
    "near -1e4": lambda s, g: _normal(s, g, 4, -1e4),
    "within 1e4": lambda s, g: _uniform(s, g, -1e4, 1e4),
    "equal": lambda s, g: torch.full(s, 3.25),
    "zero": lambda s, g: torch.zeros(s),
    "negative zero": lambda s, g: -torch.zeros(s),
    "one-hot 1e4": lambda s, g: _one(s, g, 1e4, 0.0),
    "one-hot 30": lambda s, g: _one(s, g, 30.0, 0.0),
    "one alone": lambda s, g: _one(s, g, 0.5, -INF),
    "half masked": lambda s, g: _masked(s, g, 0.5),
    "nearly masked": lambda s, g: _masked(s, g, 0.99),
    "all masked": lambda s, g: torch.full(s, -INF),
    "nan": lambda s, g: _with(s, g, float("nan"), _normal(s, g, 1)),
    "nan among -inf": _half_masked_nan,
    "inf": lambda s, g: _with(s, g, INF, _normal(s, g, 1)),
    "huge": lambda s, g: _uniform(s, g, -3.4e38, 3.4e38),
    "subnormal": lambda s, g: _normal(s, g, 1e-40),
    "edge of exp": lambda s, g: _with(s, g, 0.0, _uniform(s, g, -89, -85)),
    "steps of 87.4": lambda s, g: torch.where(torch.rand(s, generator=g) < 0.01, 0.0, -87.4),
}


def draw(family: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Logits [tokens, vocab] of a family."""
    return FAMILIES[family](shape, torch.Generator().manual_seed(seed)).to(dtype)


class Kernels(Protocol):
    """What is documented in csrc/bindings/vocab_entropy.hpp."""

    def forward(
        self, logits: Tensor, labels: Tensor | None, ignored: int, first: int,
        segment_length: int, num_segments: int, scale: float, quads: Tensor, /,
    ) -> None:  # fmt: skip
        """Logits [tokens, columns] of a rank to quads [tokens, 4]."""

    def finish(
        self, shards: Tensor, labels: Tensor | None, ignored: int, scale: float, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quads of all ranks [ranks, tokens, 4] to quads, entropy, log_prob, log_sum_exp."""

    def backward(
        self, logits: Tensor, labels: Tensor | None, ignored: int, first: int, scale: float,
        quads: Tensor, by_entropy: Tensor | None, by_log_prob: Tensor | None,
        by_log_sum_exp: Tensor | None, out: Tensor, /,
    ) -> None:  # fmt: skip
        """The gradient into ``out``, which may be the logits."""


class NativeKernels:
    """Those of the device on which the tensors are."""

    forward = staticmethod(_C.vocab_entropy_forward)
    finish = staticmethod(_C.vocab_entropy_finish)
    backward = staticmethod(_C.vocab_entropy_backward)


NATIVE = NativeKernels()


@dataclass
class Outcome:
    """What all ranks together computed: [tokens] each, quads [tokens, 4], grad like the logits."""

    entropy: Tensor
    log_prob: Tensor
    log_sum_exp: Tensor
    quads: Tensor
    grad: Tensor | None = None


def evaluate(
    logits: Tensor,
    labels: Tensor | None,
    num_ranks: int,
    grads: Tensor | None = None,
    scale: float = 1.0,
    kernels: Kernels = NATIVE,
) -> Outcome:
    """The kernels on every rank's shard of the full logits; grads [3, tokens] for a backward.

    Everything lies on the device of the logits.
    """
    vocab_size = logits.shape[1]
    shards = [VocabShard(vocab_size, rank, num_ranks) for rank in range(num_ranks)]
    parts = [logits[:, s.first : s.first + s.num_columns] for s in shards]
    quads = torch.empty(num_ranks, len(logits), 4, device=logits.device)
    for s, part, out in zip(shards, parts, quads, strict=True):
        kernels.forward(
            part, labels, IGNORED, s.first, s.segment_length, s.num_segments, scale, out
        )
    full, *results = kernels.finish(quads, labels, IGNORED, scale)
    outcome = Outcome(*results, full)
    if grads is not None:
        outcome.grad = torch.empty_like(logits)
        for s, part in zip(shards, parts, strict=True):
            # A view of the full gradient: rows with a stride.
            out = outcome.grad[:, s.first : s.first + s.num_columns]
            kernels.backward(part, labels, IGNORED, s.first, scale, full, *grads, out)
    return outcome
