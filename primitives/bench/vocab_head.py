"""The LM head fused with entropy and log-probability, forward, beside its product and torch.

Every contestant gets the same hidden states and weight, in turn, one thread; a figure is the median
over the rounds. The product alone is what no contestant can do without.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from primitives import vocab_parallel
from primitives.bench.devices import Cpu
from primitives.bench.vocab_contestants import plain
from primitives.bench.vocab_entropy import check


@dataclass(frozen=True)
class Case:
    """hidden [tokens, hidden size] and the head's weight [vocab, hidden size], of a dtype."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    dtype: str = "bfloat16"

    @property
    def flop(self) -> int:
        """Of the product."""
        return 2 * self.num_tokens * self.hidden_size * self.vocab_size


@dataclass(frozen=True)
class Row:
    """One contestant on one case."""

    case: Case
    contestant: str
    ms: float
    extra_nbytes: int | None
    """Memory beyond the inputs; None where the system does not tell."""

    @property
    def gflop_s(self) -> float:
        """As if the product were all."""
        return self.case.flop / self.ms / 1e6


CASES = (Case(1024, 1024, 155_136),)
PRODUCT = "product alone"


def measure(case: Case, num_rounds: int = 5) -> list[Row]:
    """Times all contestants, the fused one first and the product alone last."""
    torch.set_num_threads(1)
    cpu = Cpu()
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    hidden = normal(case.num_tokens, case.hidden_size)
    weight = normal(case.vocab_size, case.hidden_size).mul_(4 * case.hidden_size**-0.5)
    labels = torch.randint(case.vocab_size, (case.num_tokens,), generator=generator)
    segment = -(-case.vocab_size // 16)
    room = torch.empty(case.num_tokens, segment, dtype=dtype)

    def fused() -> tuple[Tensor, Tensor]:
        return vocab_parallel.linear_entropy_and_log_prob(hidden, weight, labels)

    def logits_first() -> tuple[Tensor, Tensor]:
        return vocab_parallel.entropy_and_log_prob(hidden @ weight.T, labels)

    def eager() -> tuple[Tensor, Tensor]:
        return plain(hidden @ weight.T, labels)

    def product() -> None:  # a 16th at a time, as fused does it
        for part in torch.split(weight, segment):
            out = room.view(-1)[: case.num_tokens * len(part)].view(case.num_tokens, len(part))
            torch.mm(hidden, part.T, out=out)

    expected = fused()
    for name, rival in (("torch", eager), ("logits first", logits_first)):
        check(name, rival(), expected)
    sides: dict[str, Callable[[], object]] = {
        "fused": fused,
        "logits first": logits_first,
        "torch": eager,
        PRODUCT: product,
    }
    memory = {name: cpu.extra_nbytes(side) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, side in sides.items():
            start = cpu.stamp()
            side()
            times[name].append(cpu.ms(start, cpu.stamp()))
    return [Row(case, name, statistics.median(times[name]), memory[name]) for name in sides]
