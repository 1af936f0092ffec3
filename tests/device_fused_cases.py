"""Random fused collectives of the CUDA device code, each compared with its definition.

As device_collective_cases.py: ``play`` is the emulation or a GPU.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from collective_cases import values
from device_collective_cases import Memory, Play, numels
from emulated_ranks import DTYPES, MAX_CHUNKS, Call, Machine, RankCall, library
from hypothesis import strategies as st
from torch import Tensor

from primitives import canonical, reference

CAST = [torch.float32, torch.float16, torch.bfloat16]
CASTS = [(a, b) for a in CAST for b in CAST]
CASTS += [(d, d) for d in (torch.int64, torch.uint8, torch.complex128, torch.float8_e5m2)]
Cut = list[list[int]]
"""[tensor][rank]: the numel of each shard."""


@dataclass
class FusedCall(RankCall):
    """A fused collective of one rank: flat contiguous tensors, ``ins[i]`` beside ``outs[i]``."""

    rank: int = 0
    cut: Cut = field(default_factory=list)
    accumulate: bool = False
    squares: Tensor | None = None

    def __post_init__(self) -> None:
        n, num = len(self.cut[0]), len(self.cut)
        flat = [numel for of_tensor in self.cut for numel in of_tensor]
        self.table = torch.zeros(table_words(n, num), dtype=torch.int64)
        streams = words([0] * n)
        num_partials: int = library().emulated_write_table(
            ctypes.c_void_p(self.table.data_ptr()),
            n,
            num,
            self.rank,
            words(flat),
            words([x.data_ptr() for x in self.ins]),
            words([x.data_ptr() for x in self.outs]),
            words([0 if self.heap is None else self.place_of(x) for x in self.ins]),
            streams,
        )
        self.stream_numels = list(streams)
        self.partials = torch.zeros(num_partials)

    def memory(self) -> list[Tensor]:
        squares = [] if self.squares is None else [self.squares]
        return [*super().memory(), *squares, self.table, self.partials]

    @property
    def longest_nbytes(self) -> int:
        """Of the longest stream."""
        staged = self.outs if self.op == "fused all_gather" else self.ins
        return max(self.stream_numels) * staged[0].itemsize

    def native(self, seq: int) -> Call:
        gathers = self.op == "fused all_gather"
        source, target = self.ins[0].dtype, self.outs[0].dtype
        call = RankCall(self.op, source, (), (), self.reduce_op, self.factor).native(seq)
        staged = target if gathers else source
        for r, numel in enumerate(self.stream_numels):
            call.in_nbytes[r] = numel * staged.itemsize
        if self.heap is not None:
            call.place = 0
        many = call.many
        many.table, many.num_tensors = self.table.data_ptr(), len(self.cut)
        many.digest = hash((*map(tuple, self.cut), self.accumulate)) % 2**64
        if gathers and source != target:
            many.from_, many.to = DTYPES.index(source), DTYPES.index(target)
        many.in_itemsize, many.out_itemsize = source.itemsize, target.itemsize
        many.accumulate = self.accumulate
        many.squares = None if self.squares is None else self.squares.data_ptr()
        many.partials = self.partials.data_ptr()
        return call


def words(numbers: list[int]) -> "ctypes.Array[ctypes.c_uint64]":
    return (ctypes.c_uint64 * len(numbers))(*numbers)


def table_words(world_size: int, num_tensors: int) -> int:
    count: int = library().emulated_table_words(world_size, num_tensors)
    return count


@st.composite
def cuts(draw: st.DrawFn, world_size: int, itemsize: int) -> Cut:
    """Few tensors of any sizes or many tiny ones; cut in chunks, as FSDP2 does, or anyhow."""
    if draw(st.integers(0, 9)) == 0:
        totals = [draw(st.integers(0, 2 * world_size)) for _ in range(draw(st.integers(20, 60)))]
    else:
        totals = draw(st.lists(numels(2 * itemsize), min_size=1, max_size=4))
    cut = []
    for total in totals:
        if draw(st.booleans()):
            chunk = -(-total // world_size)
            points = [min(total, (r + 1) * chunk) for r in range(world_size - 1)]
        else:
            points = sorted(draw(st.integers(0, total)) for _ in range(world_size - 1))
        cut.append([b - a for a, b in pairwise([0, *points, total])])
    return cut


def numbers(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Finite, so that a sum of squares shows its order; some subnormal, some zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(torch.randint(-12, 4, (numel,), generator=generator).double())
    kind = torch.randint(0, 20, (numel,), generator=generator)
    tiny = torch.finfo(dtype).tiny
    return torch.where(kind == 0, x * tiny, torch.where(kind == 1, -0.0, x)).to(dtype)


def same_bits(got: Tensor, want: Tensor, what: str) -> None:
    """Equal bits, where every NaN counts as one."""
    assert (got.dtype, got.numel()) == (want.dtype, want.numel()), what
    got, want = got.reshape(-1), want.reshape(-1)
    if got.dtype in CAST:
        nan = torch.tensor(float("nan"), dtype=got.dtype)
        got, want = (torch.where(x.isnan(), nan, x) for x in (got, want))
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)), (
        what
    )


class Inputs:
    """Where the inputs of a call lie, drawn: anywhere, or all in one chunk of symmetric memory."""

    def __init__(self, data: st.DataObject, machine: Machine, symmetric: bool, rank: int) -> None:
        self.memory = Memory(data, per_element=True)
        self.chunk = (machine.seed + 5 * rank) % MAX_CHUNKS
        self.symmetric, self.heap = symmetric, None

    def lay(self, xs: list[Tensor]) -> list[Tensor]:
        if not self.symmetric:
            return [self.memory.lay(x) for x in xs]
        self.heap, laid = self.memory.heap(xs)
        return laid


def symmetric_ranks(data: st.DataObject, machine: Machine, call: FusedCall) -> list[bool]:
    """Whose inputs are symmetric memory: none, all, or some, when a call like this may read it."""
    fits = 8 * len(call.cut) <= machine.slot_nbytes
    which = data.draw(st.sampled_from(["none", "all", "some"]))
    if not fits or call.longest_nbytes < max(1, machine.direct_nbytes) or which == "none":
        return [False] * machine.world_size
    return [which == "all" or data.draw(st.booleans()) for _ in range(machine.world_size)]


def check_all_gather_many(
    play: Play, machine: Machine, cast: tuple[torch.dtype, torch.dtype], data: st.DataObject
) -> None:
    n, (source, target) = machine.world_size, cast
    cut = data.draw(cuts(n, target.itemsize))
    wholes = [values(sum(c), source, machine.seed + i) for i, c in enumerate(cut)]
    shards = [x.split(c) for x, c in zip(wholes, cut, strict=True)]
    in_place = source == target and data.draw(st.booleans())

    def made(rank: int, symmetric: bool) -> FusedCall:
        inputs = Inputs(data, machine, symmetric, rank)
        if in_place:
            fulls = inputs.lay([values(len(x), target, 99) for x in wholes])
            own = [full.split(c)[rank] for full, c in zip(fulls, cut, strict=True)]
            mine = [x.copy_(of[rank]) for x, of in zip(own, shards, strict=True)]
        else:
            fulls = [inputs.memory.empty(x.to(target)) for x in wholes]
            mine = inputs.lay([of[rank] for of in shards])
        return FusedCall(
            "fused all_gather", ins=mine, outs=fulls, rank=rank, cut=cut,
            heap=inputs.heap, chunk=inputs.chunk,
        )  # fmt: skip

    offered = symmetric_ranks(data, machine, made(0, symmetric=False))
    calls = [made(rank, offer) for rank, offer in enumerate(offered)]
    assert play(machine, [[call] for call in calls]) == [None] * n
    for rank, call in enumerate(calls):
        for i, got in enumerate(call.outs):
            same_bits(got, wholes[i].to(target), f"rank {rank}, tensor {i} of {cut}")


@dataclass
class Gradients:
    """Full tensors of all ranks, what the shards hold, and what must come out."""

    cut: Cut
    fulls: list[list[Tensor]]
    held: list[Tensor]
    factor: float
    accumulate: bool

    def wants(self, rank: int) -> list[Tensor]:
        results = []
        for i, c in enumerate(self.cut):
            total = reference.tree([own[i].float() for own in self.fulls], torch.add)
            total = total * torch.tensor(self.factor, dtype=torch.float32)
            total = self.held[i] + total if self.accumulate else total
            results.append(total.split(c)[rank])
        return results

    def calls(
        self, squares: bool, inputs_of: Callable[[int], Inputs] | None = None
    ) -> list[FusedCall]:
        made = []
        for rank, own in enumerate(self.fulls):
            held = [x.split(c)[rank] for x, c in zip(self.held, self.cut, strict=True)]
            sums = torch.full((len(self.cut),), -1.0) if squares else None
            inputs = None if inputs_of is None else inputs_of(rank)
            fulls = [x.clone() for x in own] if inputs is None else inputs.lay(own)
            shards = [x.clone() if inputs is None else inputs.memory.lay(x) for x in held]
            made.append(
                FusedCall(
                    "fused reduce_scatter",
                    own[0].dtype,
                    fulls,
                    shards,
                    "sum",
                    self.factor,
                    rank=rank,
                    cut=self.cut,
                    accumulate=self.accumulate,
                    squares=sums,
                    heap=None if inputs is None else inputs.heap,
                    chunk=0 if inputs is None else inputs.chunk,
                )
            )
        return made

    def check(self, rank: int, call: FusedCall) -> None:
        for i, (got, want) in enumerate(zip(call.outs, self.wants(rank), strict=True)):
            same_bits(got, want, f"rank {rank}, tensor {i} of {self.cut}")
            if call.squares is not None:
                want = canonical.sum_of_squares(got.clone())
                same_bits(call.squares[i], want, f"squares of rank {rank}, tensor {i}: {self.cut}")


def gradients(
    cut: Cut, dtype: torch.dtype, seed: int, factor: float, accumulate: bool, finite: bool = True
) -> Gradients:
    draw = numbers if finite else values
    fulls = [
        [draw(sum(c), dtype, seed + 99 * r + i) for i, c in enumerate(cut)]
        for r in range(len(cut[0]))
    ]
    held = [draw(sum(c), torch.float32, seed + 999 + i) for i, c in enumerate(cut)]
    return Gradients(cut, fulls, held, factor, accumulate)


def check_reduce_scatter_many(
    play: Play, machine: Machine, dtype: torch.dtype, data: st.DataObject
) -> None:
    cut = data.draw(cuts(machine.world_size, dtype.itemsize))
    factor = data.draw(st.sampled_from([1.0, 0.25, 1 / 3, -7e-3]))
    accumulate, finite = data.draw(st.booleans()), data.draw(st.integers(0, 3)) > 0
    grads = gradients(cut, dtype, machine.seed, factor, accumulate, finite)
    offered = symmetric_ranks(data, machine, grads.calls(squares=False)[0])
    calls = grads.calls(
        data.draw(st.booleans()), lambda rank: Inputs(data, machine, offered[rank], rank)
    )
    assert play(machine, [[call] for call in calls]) == [None] * machine.world_size
    for rank, call in enumerate(calls):
        grads.check(rank, call)


def fused_series(
    world_size: int, num_calls: int
) -> tuple[list[list[RankCall]], list[Gradients | list[Tensor]]]:
    """Both in turn, of several sizes; with what each must give."""
    n = world_size
    calls: list[list[RankCall]] = [[] for _ in range(n)]
    wants: list[Gradients | list[Tensor]] = []
    for i in range(num_calls):
        dtype = CAST[i % 3]
        cut = [[(7 + 31 * i * i + 13 * t + 5 * r) % 400 for r in range(n)] for t in range(3)]
        if i % 2 == 0:
            grads = gradients(cut, dtype, i, 0.5, accumulate=i % 4 == 0)
            for r, call in enumerate(grads.calls(squares=True)):
                calls[r].append(call)
            wants.append(grads)
            continue
        wholes = [numbers(sum(c), dtype, i + t) for t, c in enumerate(cut)]
        target = CAST[(i + 1) % 3]
        for r in range(n):
            mine = [x.split(c)[r].clone() for x, c in zip(wholes, cut, strict=True)]
            fulls = [torch.zeros(sum(c), dtype=target) for c in cut]
            calls[r].append(FusedCall("fused all_gather", ins=mine, outs=fulls, rank=r, cut=cut))
        wants.append([x.to(target) for x in wholes])
    return calls, wants


def assert_fused_series(calls: Any, wants: list[Gradients | list[Tensor]]) -> None:
    for i, want in enumerate(wants):
        for r, own in enumerate(calls):
            if isinstance(want, Gradients):
                want.check(r, own[i])
                continue
            for got, full in zip(own[i].outs, want, strict=True):
                same_bits(got, full, f"call {i}, rank {r}")
