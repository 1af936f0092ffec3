"""Entropy and log-probability, forward and backward, beside what others offer.

Every contestant gets the same logits, in turn; a figure is the median over the rounds. The limits,
reading all logits, and reading and writing as much, are measured in the same rounds. What a
contestant needs above the logits is its gradient included. On the CPU one thread runs.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from primitives.bench.devices import LIMITS, Cpu, Device
from primitives.bench.vocab_contestants import Function, contestants


@dataclass(frozen=True)
class Case:
    """Logits [tokens, vocab] of a dtype."""

    num_tokens: int
    vocab_size: int
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Of the logits."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return self.num_tokens * self.vocab_size * itemsize


@dataclass(frozen=True)
class Row:
    """One contestant on one case."""

    case: Case
    contestant: str
    forward_ms: float
    backward_ms: float
    extra_nbytes: int | None
    """Memory beyond the logits; None where the system does not tell."""
    num_collectives: int
    limit_ms: dict[str, float]
    """By the names of LIMITS."""

    @property
    def ms(self) -> float:
        """Forward and backward."""
        return self.forward_ms + self.backward_ms

    @property
    def forward_share(self) -> float:
        """Of the speed at which the logits can be read."""
        return self.limit_ms["read"] / self.forward_ms

    @property
    def backward_share(self) -> float:
        """Of the speed at which they can be read and written."""
        return self.limit_ms["read + write"] / self.backward_ms

    @property
    def forward_gb_s(self) -> float:
        """Logits read once."""
        return self.case.nbytes / self.forward_ms / 1e6

    @property
    def backward_gb_s(self) -> float:
        """Logits read and as many bytes of gradient written."""
        return 2 * self.case.nbytes / self.backward_ms / 1e6


CASES = (
    Case(256, 155_136),
    Case(2048, 32_768),
    Case(256, 155_136, "bfloat16"),
    Case(2048, 32_768, "bfloat16"),
    Case(16, 19_392, "bfloat16"),  # few tokens, an eighth of a vocabulary: the price of a call
)
CUDA_CASES = (
    Case(16_384, 155_136, "bfloat16"),
    Case(16_384, 32_768, "bfloat16"),
    Case(4_096, 155_136, "float32"),
    Case(64, 155_136, "bfloat16"),
)


class Bench:
    """The inputs of a case, and one forward and backward of anybody on them."""

    def __init__(self, case: Case, on: Device) -> None:
        self.on = on
        generator = torch.Generator(on.device).manual_seed(7)
        shape = (case.num_tokens, case.vocab_size)
        dtype, device = getattr(torch, case.dtype), on.device
        self.source = torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(4)
        self.labels = torch.randint(
            case.vocab_size, shape[:1], generator=generator, device=on.device
        )
        self.grads = torch.randn(2, case.num_tokens, generator=generator, device=on.device)
        self.memory = torch.empty_like(self.source).requires_grad_()

    def logits(self) -> Tensor:
        """As a layer hands them over: no leaf of autograd, in memory of their own."""
        with torch.no_grad():
            self.memory.copy_(self.source)
        return self.memory.view_as(self.memory)

    def run(self, function: Function) -> tuple[float, float, tuple[Tensor, Tensor]]:
        """Milliseconds of forward and of backward, and entropy and log_prob."""
        logits = self.logits()
        start = self.on.stamp()
        entropy, log_prob = function(logits, self.labels)
        middle = self.on.stamp()
        grads = tuple(g.to(x.dtype) for g, x in zip(self.grads, (entropy, log_prob), strict=True))
        outputs = [x for x in (entropy, log_prob) if x.requires_grad]
        wanted = [g for g, x in zip(grads, (entropy, log_prob), strict=True) if x.requires_grad]
        begun = self.on.stamp()
        (gradient,) = torch.autograd.grad(outputs, logits, wanted)
        end = self.on.stamp()
        del gradient
        return (
            self.on.ms(start, middle),
            self.on.ms(begun, end),
            (entropy.detach().float(), log_prob.detach().float()),
        )


def num_collectives(work: Callable[[], object]) -> int:
    """Calls of c10d during ``work``, of any backend."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("c10d::"))


def check(name: str, results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Raises AssertionError where a contestant computes something else."""
    for what, actual, right in zip(("entropy", "log_prob"), results, expected, strict=True):
        if bool(actual.isnan().all()):
            continue  # it does not compute this
        worst = float(((actual - right).abs() / right.abs().clamp(min=1)).max())
        if worst > 0.05:  # entropy in bfloat16 is no better
            raise AssertionError(f"{name}: {what} is off by {worst:.3g} relative")


@contextmanager
def group_of_one(on: Device) -> Iterator[None]:
    """The process group that some contestants need; one that was there already stays."""
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if on.device.type == "cuda" else "primitives"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(cases: list[Case], num_rounds: int = 5, on: Device | None = None) -> Iterator[Row]:
    """Times all contestants on each case, one thread; the rows of a case follow each other.

    A contestant that runs out of a GPU's memory has no row.
    """
    torch.set_num_threads(1)
    on = on or Cpu()
    with group_of_one(on):
        rivals = contestants(on.device.type)
        for case in cases:
            yield from _measure_case(case, rivals, num_rounds, on)


def _measure_case(
    case: Case, rivals: dict[str, Function], num_rounds: int, on: Device
) -> Iterator[Row]:
    bench = Bench(case, on)
    expected = bench.run(rivals["in place"])[2]
    memory, calls = {}, {}
    for name, function in rivals.items():
        try:
            check(name, bench.run(function)[2], expected)
            bench.run(function)  # compilers may wait for a second call
        except torch.OutOfMemoryError:
            continue
        memory[name] = on.extra_nbytes(lambda: bench.run(function))  # noqa: B023
        calls[name] = num_collectives(lambda: bench.run(function))  # noqa: B023
    names = list(memory)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    limits: dict[str, list[float]] = {name: [] for name in LIMITS}
    for turn in range(num_rounds):
        for limit, limit_ms in on.limits_ms(bench.logits).items():
            limits[limit].append(limit_ms)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            forward_ms, backward_ms, _ = bench.run(rivals[name])
            times[name].append((forward_ms, backward_ms))
    medians = {name: statistics.median(found) for name, found in limits.items()}
    for name, pairs in times.items():
        forward_ms, backward_ms = (statistics.median(x) for x in zip(*pairs, strict=True))
        yield Row(case, name, forward_ms, backward_ms, memory[name], calls[name], medians)
