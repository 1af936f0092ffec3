"""Prints digests of forward and backward, case by case and tp by tp, for one instruction set."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from vocab_cases import FAMILIES, IGNORED, draw, evaluate

from primitives import _C

VOCAB_SIZES = (155_136, 50_257, 32_768, 8_232, 1_000, 296, 17, 4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Case:
    """Some tokens of one kind."""

    family: str
    vocab_size: int
    dtype: torch.dtype

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Logits, labels, gradients and the scale; from a generator that no CPU changes."""
        seed = int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:4])
        num_tokens = 2 if self.vocab_size > 10_000 else 4
        logits = draw(self.family, (num_tokens, self.vocab_size), self.dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(self.vocab_size, (num_tokens,), generator=generator)
        labels[0] = IGNORED
        grads = torch.randint(-8, 9, (3, num_tokens), generator=generator) / 8
        return logits, labels, grads, 0.7 if seed % 3 == 0 else 1.0


def cases() -> Iterator[Case]:
    for vocab_size in VOCAB_SIZES:
        for dtype in DTYPES:
            for family in FAMILIES:
                yield Case(family, vocab_size, dtype)


def digest(*tensors: Tensor) -> str:
    words = hashlib.sha256()
    for tensor in tensors:
        words.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return words.hexdigest()


def digests() -> Iterator[tuple[str, str]]:
    """(case and what, digest) for each tp."""
    for case in cases():
        logits, labels, grads, scale = case.inputs()
        yield f"inputs {case}", digest(logits, labels, grads)
        for num_ranks in RANKS:
            o = evaluate(logits, labels, num_ranks, grads, scale)
            assert o.grad is not None
            forward = digest(o.entropy, o.log_prob, o.log_sum_exp, o.quads)
            yield f"forward {case}", forward
            yield f"backward {case}", digest(o.grad)


if __name__ == "__main__":
    found: dict[str, list[str]] = {}
    for key, value in digests():
        found.setdefault(key, []).append(value)
    print(json.dumps({"isa": _C.active_isa(), "digests": found}))
