"""Entropy and log-probability, forward and backward, beside what others offer; one thread.

Every contestant gets the same logits, in turn; a figure is the median over the rounds. The limits,
reading all logits, and reading and writing them in place, are measured in the same rounds by loops
that do nothing else. What a contestant needs above the logits is the growth of the process's
largest resident set during one forward and backward, its gradient included.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from primitives import _C
from primitives.bench.vocab_contestants import Function, contestants

LIMITS = {"read": 1, "read + write": 2}
"""Name of each limit, and how many times it moves the logits."""


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
)


class Bench:
    """The inputs of a case, and one forward and backward of anybody on them."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(7)
        shape = (case.num_tokens, case.vocab_size)
        logits = torch.randn(shape, generator=generator) * 4
        self.source = logits.to(getattr(torch, case.dtype))
        self.labels = torch.randint(case.vocab_size, shape[:1], generator=generator)
        self.grads = torch.randn(2, case.num_tokens, generator=generator)
        self.memory = torch.empty_like(self.source).requires_grad_()

    def logits(self) -> Tensor:
        """As a layer hands them over: no leaf of autograd, in memory of their own."""
        with torch.no_grad():
            self.memory.copy_(self.source)
        return self.memory.view_as(self.memory)

    def run(self, function: Function) -> tuple[float, float, tuple[Tensor, Tensor]]:
        """Milliseconds of forward and of backward, and entropy and log_prob."""
        logits = self.logits()
        start = time.perf_counter()
        entropy, log_prob = function(logits, self.labels)
        middle = time.perf_counter()
        grads = tuple(g.to(x.dtype) for g, x in zip(self.grads, (entropy, log_prob), strict=True))
        outputs = [x for x in (entropy, log_prob) if x.requires_grad]
        wanted = [g for g, x in zip(grads, (entropy, log_prob), strict=True) if x.requires_grad]
        begun = time.perf_counter()
        (gradient,) = torch.autograd.grad(outputs, logits, wanted)
        end = time.perf_counter()
        del gradient
        return (
            1e3 * (middle - start),
            1e3 * (end - begun),
            (entropy.detach().float(), log_prob.detach().float()),
        )

    def limit_ms(self, which: str) -> float:
        """Milliseconds of a limit: the faster of with and without software prefetch."""
        work: Callable[[Tensor, bool], Any]
        work = _C.read_words if which == "read" else _C.flip_words
        memory = self.memory.detach().view(-1).view(torch.uint8)
        memory = memory[: memory.numel() // 1024 * 1024]
        times = []
        for prefetch in (False, True):
            start = time.perf_counter()
            work(memory, prefetch)
            times.append(1e3 * (time.perf_counter() - start))
        return min(times)


def extra_nbytes(work: Callable[[], object]) -> int | None:
    """How much the resident set grew at most during ``work``; None where that is not told."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


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
def group_of_one() -> Iterator[None]:
    """The process group that some contestants need; one that was there already stays."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(cases: list[Case], num_rounds: int = 5) -> Iterator[Row]:
    """Times all contestants on each case, one thread; the rows of a case follow each other."""
    torch.set_num_threads(1)
    with group_of_one():
        rivals = contestants()
        for case in cases:
            yield from _measure_case(case, rivals, num_rounds)


def _measure_case(case: Case, rivals: dict[str, Function], num_rounds: int) -> Iterator[Row]:
    bench = Bench(case)
    expected = bench.run(rivals["in place"])[2]
    memory, calls = {}, {}
    for name, function in rivals.items():
        check(name, bench.run(function)[2], expected)
        bench.run(function)  # compilers may wait for a second call
        memory[name] = extra_nbytes(lambda: bench.run(function))  # noqa: B023
        calls[name] = num_collectives(lambda: bench.run(function))  # noqa: B023
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    limits: dict[str, list[float]] = {name: [] for name in LIMITS}
    names = list(rivals)
    for turn in range(num_rounds):
        for limit, found in limits.items():
            found.append(bench.limit_ms(limit))
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            forward_ms, backward_ms, _ = bench.run(rivals[name])
            times[name].append((forward_ms, backward_ms))
    limit_ms = {name: statistics.median(found) for name, found in limits.items()}
    for name, pairs in times.items():
        forward_ms, backward_ms = (statistics.median(x) for x in zip(*pairs, strict=True))
        yield Row(case, name, forward_ms, backward_ms, memory[name], calls[name], limit_ms)
