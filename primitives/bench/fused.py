"""Fused collectives beside what FSDP2 does with gloo or NCCL, and with the primitives backend.

Contestants, on the same parameters and one thread a rank:

* ``fsdp2 gloo``, ``fsdp2 nccl``, ``fsdp2 primitives``: copy and cast into a flat buffer, one
  collective, copy out; for gradients ``_chunk_cat``, reduce_scatter, division, addition to the
  shards, norms. gloo on the CPU; NCCL where each rank has a GPU of its own;
* ``eager``: the same one tensor after the other, with the primitives backend;
* ``fused``: ``primitives.collectives`` on ordinary tensors;
* ``fused symmetric``: the same in symmetric memory; on the CPU the full tensors, on CUDA the inputs
  lie there.

The ranks alternate between the contestants, a block of calls at a time. A figure is the median over
blocks of (latest end - earliest start) / calls over the ranks. A block of reduce_scatter is one
call: before it, untimed, every rank writes its gradients anew, as a backward pass would, and clears
what they are added to. Every contestant's result is compared with the first one's before it is
timed.
"""

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from primitives import collectives, memory
from primitives.bench.device_contestants import finish
from primitives.bench.processes import run_ranks


def backends(device: torch.device, num_ranks: int) -> list[str]:
    """Whose collectives there are, the one to compare with first."""
    if device.type == "cpu":
        return ["gloo", "primitives"]
    alone = torch.cuda.device_count() >= num_ranks and dist.is_nccl_available()
    return ["nccl", "primitives"] if alone else ["primitives"]


@dataclass(frozen=True)
class Contestant:
    """One way to do it."""

    run: Callable[[], list[Tensor]]
    """The whole operation; its outputs."""
    prepare: Callable[[], object] | None = None
    """Needed before every call, untimed."""


Contestants = dict[str, Contestant]


@dataclass(frozen=True)
class Case:
    """One set of parameters."""

    op: str
    """all_gather (float32 shards to bfloat16 full tensors) or reduce_scatter (to float32)."""
    dtype: str = "float32"
    """Of the gradients."""
    num_tensors: int = 200
    numel: int = 20_000_000
    """Of all tensors together; sizes vary by a factor of about 1000, all odd."""


@dataclass(frozen=True)
class Row:
    """Median times of one case in milliseconds."""

    case: Case
    time_ms: dict[str, float]

    def ratio(self, contestant: str) -> float:
        """How many times sooner than the first contestant."""
        return next(iter(self.time_ms.values())) / self.time_ms[contestant]


CASES = (
    Case("all_gather"),
    Case("reduce_scatter"),
    Case("reduce_scatter", "bfloat16"),
    Case("all_gather", numel=1_000_000),
    Case("reduce_scatter", numel=1_000_000),
)


def numels(case: Case) -> list[int]:
    """Odd sizes of the full tensors, the same on every rank."""
    dice = random.Random(7)
    weights = [
        dice.choice([1, 1, 1, 3, 50, 50, 200, 400]) * dice.uniform(0.5, 1.5)
        for _ in range(case.num_tensors)
    ]
    return [max(5, int(case.numel * weight / sum(weights)) | 1) for weight in weights]


class Parameters:
    """The buffers of one rank: ``full`` elements a tensor, ``chunk`` on all ranks but the last."""

    def __init__(self, case: Case, rank: int, world_size: int) -> None:
        self.world_size = world_size
        self.full = numels(case)
        self.chunk = [(numel + world_size - 1) // world_size for numel in self.full]
        starts = [min(f, c * rank) for f, c in zip(self.full, self.chunk, strict=True)]
        ends = [min(f, s + c) for f, s, c in zip(self.full, starts, self.chunk, strict=True)]
        self.own = [end - start for start, end in zip(starts, ends, strict=True)]

    def symmetric(
        self, numels: list[int], dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device
    ) -> list[Tensor]:
        """Tensors in symmetric memory."""
        flat = memory.empty(sum(numels), dtype=dtype, group=group, device=device).zero_()
        return list(flat.split_with_sizes(numels))


def all_gather(
    case: Case, groups: dict[str, dist.ProcessGroup], device: torch.device
) -> Contestants:
    """float32 shards to bfloat16 full tensors."""
    ours, rank = groups["primitives"], dist.get_rank()
    of = Parameters(case, rank, dist.get_world_size())
    generator = torch.Generator().manual_seed(rank)
    padded = [torch.randn(chunk, generator=generator).to(device) for chunk in of.chunk]
    shards = [x[:numel] for x, numel in zip(padded, of.own, strict=True)]
    made = partial(torch.zeros, dtype=torch.bfloat16, device=device)
    sent, received = made(sum(of.chunk)), made(of.world_size * sum(of.chunk))
    pieces, views = list(sent.split_with_sizes(of.chunk)), received.view(of.world_size, -1)
    outs = [made(of.world_size * chunk) for chunk in of.chunk]
    by_rank = [out.view(of.world_size, -1) for out in outs]
    unpadded = [out[:numel] for out, numel in zip(outs, of.full, strict=True)]
    ordinary = [made(numel) for numel in of.full]

    def fsdp2(group: dist.ProcessGroup) -> list[Tensor]:
        torch._foreach_copy_(pieces, padded)
        collectives.all_gather_flat(received, sent, group=group)
        torch.split_with_sizes_copy(views, of.chunk, dim=1, out=by_rank)
        return unpadded

    def eager() -> list[Tensor]:
        for out, shard in zip(outs, padded, strict=True):
            collectives.all_gather_flat(out, shard.to(out.dtype), group=ours)
        return unpadded

    def fused(fulls: list[Tensor], shards: list[Tensor] = shards) -> list[Tensor]:
        collectives.all_gather(shards, fulls, group=ours)
        return fulls

    contestants = {
        f"fsdp2 {name}": Contestant(partial(fsdp2, group)) for name, group in groups.items()
    }
    contestants |= {
        "eager": Contestant(eager),
        "fused": Contestant(lambda: fused(ordinary)),
    }
    if device.type == "cpu":
        symmetric = of.symmetric(of.full, torch.bfloat16, ours, device)
        contestants["fused symmetric"] = Contestant(lambda: fused(symmetric))
    else:
        chunks = of.symmetric(of.chunk, torch.float32, ours, device)
        torch._foreach_copy_(chunks, padded)
        own = [x[:numel] for x, numel in zip(chunks, of.own, strict=True)]
        contestants["fused symmetric"] = Contestant(lambda: fused(ordinary, own))
    return contestants


def reduce_scatter(
    case: Case, groups: dict[str, dist.ProcessGroup], device: torch.device
) -> Contestants:
    """Gradients to float32 shards: mean over ranks, accumulated, with sums of squares."""
    ours, rank, n = groups["primitives"], dist.get_rank(), dist.get_world_size()
    of, dtype = Parameters(case, rank, n), getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(rank)
    # Small integers: exact in any order of summation.
    drawn = (torch.randint(-4, 5, (numel,), generator=generator) for numel in of.full)
    grads = [x.to(device, dtype) for x in drawn]
    made = partial(torch.zeros, device=device)
    sent, received = made(n, sum(of.chunk)), made(sum(of.chunk))
    pieces = list(received.split_with_sizes(of.chunk))
    padded = [made(chunk) for chunk in of.chunk]
    unpadded = [x[:numel] for x, numel in zip(padded, of.own, strict=True)]
    shards, squares = [made(numel) for numel in of.own], made(case.num_tensors)

    def fsdp2(group: dist.ProcessGroup) -> list[Tensor]:
        torch._chunk_cat(grads, dim=0, num_chunks=n, out=sent)
        collectives.reduce_scatter_flat(received, sent.view(-1), group=group)
        received.div_(n)
        torch._foreach_add_(padded, pieces)
        torch._foreach_norm(padded)
        return unpadded

    def eager() -> list[Tensor]:
        for grad, chunk, shard in zip(grads, of.chunk, padded, strict=True):
            whole, own = made(n * chunk), made(chunk)
            whole[: grad.numel()].copy_(grad)
            collectives.reduce_scatter_flat(own, whole, group=ours)
            shard.add_(own.div_(n))
            torch.linalg.vector_norm(shard)
        return unpadded

    def fused(fulls: list[Tensor]) -> list[Tensor]:
        collectives.reduce_scatter(
            fulls, shards, factor=1 / n, accumulate=True, squares=squares, group=ours
        )
        return shards

    def backward(inputs: list[Tensor], accumulated: list[Tensor]) -> Callable[[], object]:
        def write() -> None:
            torch._foreach_mul_(inputs, 1.0)
            torch._foreach_zero_(accumulated)

        return write

    again = backward(grads, padded)
    contestants = {
        f"fsdp2 {name}": Contestant(partial(fsdp2, group), again) for name, group in groups.items()
    }
    contestants |= {
        "eager": Contestant(eager, again),
        "fused": Contestant(lambda: fused(grads), backward(grads, shards)),
    }
    symmetric = of.symmetric(of.full, dtype, ours, device)
    torch._foreach_copy_(symmetric, grads)
    contestants["fused symmetric"] = Contestant(
        lambda: fused(symmetric), backward(symmetric, shards)
    )
    return contestants


def timed(contestant: Contestant, device: torch.device, num_calls: int = 1) -> float:
    """Milliseconds a call takes, from the first rank's start to the last one's end."""
    if contestant.prepare:
        contestant.prepare()
    finish(device)
    dist.barrier()
    finish(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        contestant.run()
    finish(device)
    span = torch.tensor([-start, time.perf_counter()], dtype=torch.float64)
    dist.all_reduce(span, op=dist.ReduceOp.MAX)
    return 1e3 * float(span.sum()) / num_calls


def run_case(
    case: Case, groups: dict[str, dist.ProcessGroup], device: torch.device, num_rounds: int
) -> Row:
    """Checks and times all contestants; on every rank."""
    make = {"all_gather": all_gather, "reduce_scatter": reduce_scatter}[case.op]
    contestants = make(case, groups, device)
    expected: list[Tensor] = []
    num_calls = {}
    for name, contestant in contestants.items():
        if contestant.prepare:
            contestant.prepare()
        outputs = contestant.run()
        expected = expected or [x.clone() for x in outputs]
        if not all(map(torch.equal, outputs, expected)):
            raise AssertionError(f"{name}: the results differ from those of the first contestant")
        once_ms = timed(contestant, device)
        num_calls[name] = 1 if contestant.prepare else max(1, int(30 / once_ms))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(num_rounds):
        for name, contestant in contestants.items():
            samples[name].append(timed(contestant, device, num_calls[name]))
    return Row(case, {name: statistics.median(times) for name, times in samples.items()})


def run_rank(cases: list[Case], kind: str, num_rounds: int) -> list[Row]:
    """One rank, in its own process."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    groups = {name: dist.new_group(backend=name) for name in backends(device, num_ranks)}
    return [run_case(case, groups, device, num_rounds) for case in cases]


def measure(
    world_size: int, cases: list[Case], num_rounds: int = 20, device: str = "cpu"
) -> list[Row]:
    """Runs the cases on ``world_size`` fresh processes of this host, one thread each.

    Args:
        world_size: number of ranks.
        cases: what to measure.
        num_rounds: blocks of each contestant.
        device: "cpu", or "cuda": the ranks take the GPUs in turn.

    Raises:
        RuntimeError: a rank failed; its message is on stderr.
    """
    return run_ranks(partial(run_rank, cases, device, num_rounds), world_size, timedelta(minutes=2))
