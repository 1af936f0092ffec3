"""Random calls of the CUDA collectives, each compared with primitives.reference.

``play`` is where they are played: on the emulation (test_collective_emulator.py) or on a GPU
(gpu/test_gpu_collectives.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from collective_cases import FLOAT_OPS, FLOATS, INTEGER_OPS, assert_bits, values
from emulated_ranks import DTYPES, MAX_CHUNKS, Failure, Machine, RankCall, misaligned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from primitives import reference

Play = Callable[[Machine, Sequence[Sequence[RankCall]]], list[Failure | None]]
REDUCED = [(d, o) for d in DTYPES for o in (FLOAT_OPS if d in FLOATS else INTEGER_OPS)]
REDUCED += [(d, "premul_sum") for d in FLOATS]
MOVED = [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    world_size = draw(st.integers(1, 8))
    return Machine(
        world_size,
        num_lanes=draw(st.sampled_from([8, 16, 32])),
        max_blocks=draw(st.integers(1, 4)),
        slot_nbytes=256 * draw(st.integers(1, 4)),
        block_nbytes=draw(st.sampled_from([128, 512, 4096])),
        one_shot_nbytes=draw(st.sampled_from([0, 64, 1024])),
        direct_nbytes=draw(st.sampled_from([1, 256])),
        seed=draw(st.integers(0, 2**32)),
    )


def numels(itemsize: int) -> st.SearchStrategy[int]:
    """Mostly a few hundred bytes; up to some chunks of some blocks."""
    few = st.integers(0, 600 // itemsize)
    return st.one_of(few, few, few, st.integers(0, 6000 // itemsize))


class Memory:
    """Draws where tensors lie."""

    def __init__(self, data: st.DataObject, per_element: bool) -> None:
        self.data, self.per_element = data, per_element

    def lay(self, x: Tensor) -> Tensor:
        step = x.itemsize if self.per_element else 1
        return misaligned(x, self.data.draw(st.sampled_from(range(0, 16, step))))

    def empty(self, x: Tensor) -> Tensor:
        return self.lay(values(x.numel(), x.dtype, 99))

    def heap(self, parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Symmetric memory with the parts in it, one behind the other, at a place of their own."""
        whole = torch.cat(parts)
        nbytes = whole.numel() * whole.itemsize
        step = whole.itemsize if self.per_element else 1
        begin = 16 * self.data.draw(st.integers(0, 3))
        begin += self.data.draw(st.sampled_from(range(0, 16, step)))
        heap = misaligned(torch.zeros(nbytes + 80, dtype=torch.uint8), 0)
        if nbytes == 0:
            return heap, [heap[:0].view(whole.dtype) for _ in parts]
        inside = torch.frombuffer(
            heap.numpy(), dtype=whole.dtype, offset=begin, count=whole.numel()
        ).copy_(whole)
        return heap, list(inside.split([len(x) for x in parts]))


def offers(data: st.DataObject, machine: Machine, nbytes: int | list[list[int]]) -> list[bool]:
    """Which ranks offer their inputs: none, all, or some, of those that may.

    Args:
        data: of hypothesis.
        machine: says from which size on.
        nbytes: of a part, or of the parts of each rank.
    """
    parts = [[nbytes]] * machine.world_size if isinstance(nbytes, int) else nbytes
    may = [of[0] > 0 and max(of) >= max(1, machine.direct_nbytes) for of in parts]
    which = data.draw(st.sampled_from(["none", "all", "some"]))
    return [
        one and (which == "all" or (which == "some" and data.draw(st.booleans()))) for one in may
    ]


def play_all(play: Play, machine: Machine, calls: list[RankCall]) -> None:
    """One call of every rank; nobody may report a failure. Chunks have any numbers."""
    for rank, call in enumerate(calls):
        call.chunk = (machine.seed + 5 * rank) % MAX_CHUNKS
    assert play(machine, [[call] for call in calls]) == [None] * machine.world_size


def check_all_reduce(play: Play, machine: Machine, reduced: Any, data: st.DataObject) -> None:
    dtype, op = reduced
    numel = data.draw(numels(dtype.itemsize))
    factor = data.draw(st.sampled_from([0.5, 3.0, 1e-3])) if op == "premul_sum" else 0.0
    xs = [values(numel, dtype, machine.seed + r) for r in range(machine.world_size)]
    memory = Memory(data, per_element=True)
    nbytes = numel * dtype.itemsize
    offered = offers(data, machine, nbytes if nbytes > machine.one_shot_nbytes else 0)
    in_place = data.draw(st.booleans())
    calls = []
    for x, offer in zip(xs, offered, strict=True):
        heap, (source,) = memory.heap([x]) if offer else (None, [memory.lay(x)])
        out = source if offer or in_place else memory.empty(x)
        calls.append(RankCall("all_reduce", dtype, [source], [out], op, factor, heap=heap))
    play_all(play, machine, calls)
    want = reference.reduce(xs, op, factor)
    for call in calls:
        assert_bits(call.outs[0], want)


def check_reduce_scatter(play: Play, machine: Machine, reduced: Any, data: st.DataObject) -> None:
    dtype, op = reduced
    n = machine.world_size
    numel = data.draw(numels(dtype.itemsize * 2))
    factor = data.draw(st.sampled_from([0.5, 3.0, 1e-3])) if op == "premul_sum" else 0.0
    xs = [[values(numel, dtype, machine.seed + 9 * s + r) for r in range(n)] for s in range(n)]
    memory = Memory(data, per_element=True)
    offered = offers(data, machine, numel * dtype.itemsize)
    in_place = data.draw(st.booleans())
    calls = []
    for rank, offer in enumerate(offered):
        heap, parts = memory.heap(xs[rank]) if offer else (None, [memory.lay(x) for x in xs[rank]])
        out = parts[rank] if in_place else memory.empty(xs[0][0])
        calls.append(RankCall("reduce_scatter", dtype, parts, [out], op, factor, heap=heap))
    play_all(play, machine, calls)
    for rank, call in enumerate(calls):
        assert_bits(call.outs[0], reference.reduce([parts[rank] for parts in xs], op, factor))


def check_all_gather(play: Play, machine: Machine, dtype: torch.dtype, data: st.DataObject) -> None:
    n = machine.world_size
    uneven = data.draw(st.booleans())
    sizes = numels(dtype.itemsize)
    drawn = [data.draw(sizes) for _ in range(n)] if uneven else [data.draw(sizes)] * n
    xs = [values(numel, dtype, machine.seed + r) for r, numel in enumerate(drawn)]
    memory = Memory(data, per_element=False)
    offered = offers(data, machine, [[x.numel() * x.itemsize] for x in xs])
    in_place = not uneven and data.draw(st.booleans())
    calls = []
    for rank, offer in enumerate(offered):
        heap, (x,) = memory.heap([xs[rank]]) if offer else (None, [memory.lay(xs[rank])])
        outs = [memory.empty(y) for y in xs]
        if in_place:
            outs[rank] = x
        calls.append(RankCall("all_gather", dtype, [x] * n, outs, has_counts=uneven, heap=heap))
    play_all(play, machine, calls)
    for call in calls:
        for got, want in zip(call.outs, xs, strict=True):
            assert_bits(got, want)


def check_all_to_all(play: Play, machine: Machine, dtype: torch.dtype, data: st.DataObject) -> None:
    n = machine.world_size
    uneven = data.draw(st.booleans())
    sizes = numels(dtype.itemsize * 2)
    drawn = [data.draw(sizes) for _ in range(n)] if uneven else [data.draw(sizes)] * n
    xs = [
        [values(drawn[(s + r) % n], dtype, machine.seed + 9 * s + r) for r in range(n)]
        for s in range(n)
    ]
    memory = Memory(data, per_element=False)
    offered = offers(data, machine, [[x.numel() * x.itemsize for x in of] for of in xs])
    calls = []
    for rank, offer in enumerate(offered):
        heap, parts = memory.heap(xs[rank]) if offer else (None, [memory.lay(x) for x in xs[rank]])
        outs = [memory.empty(xs[s][rank]) for s in range(n)]
        calls.append(RankCall("all_to_all", dtype, parts, outs, has_counts=uneven, heap=heap))
    play_all(play, machine, calls)
    for rank, call in enumerate(calls):
        for s, got in enumerate(call.outs):
            assert_bits(got, xs[s][rank])


def check_broadcast(play: Play, machine: Machine, dtype: torch.dtype, data: st.DataObject) -> None:
    n = machine.world_size
    numel = data.draw(numels(dtype.itemsize))
    root = data.draw(st.integers(0, n - 1))
    xs = [values(numel, dtype, machine.seed + r) for r in range(n)]
    memory = Memory(data, per_element=False)
    offered = offers(data, machine, numel * dtype.itemsize)
    calls = []
    for x, offer in zip(xs, offered, strict=True):
        heap, (source,) = memory.heap([x]) if offer else (None, [memory.lay(x)])
        calls.append(RankCall("broadcast", dtype, [source], [source], root=root, heap=heap))
    play_all(play, machine, calls)
    for call in calls:
        assert_bits(call.outs[0], xs[root])


def check_reduce(play: Play, machine: Machine, reduced: Any, data: st.DataObject) -> None:
    n, (dtype, op) = machine.world_size, reduced
    numel = data.draw(numels(dtype.itemsize))
    root = data.draw(st.integers(0, n - 1))
    factor = 0.3 if op == "premul_sum" else 0.0
    xs = [values(numel, dtype, machine.seed + r) for r in range(n)]
    memory = Memory(data, per_element=True)
    calls = []
    for rank, x in enumerate(xs):
        source = memory.lay(x)
        out = memory.empty(x) if rank == root and data.draw(st.booleans()) else source
        calls.append(RankCall("reduce", dtype, [source], [out], op, factor, root=root))
    play_all(play, machine, calls)
    for rank, call in enumerate(calls):
        want = reference.reduce(xs, op, factor) if rank == root else xs[rank]
        assert_bits(call.outs[0], want)


def check_gather_scatter(
    play: Play, machine: Machine, dtype: torch.dtype, data: st.DataObject
) -> None:
    n = machine.world_size
    numel = data.draw(numels(dtype.itemsize))
    root = data.draw(st.integers(0, n - 1))
    op = data.draw(st.sampled_from(["gather", "scatter"]))
    xs = [values(numel, dtype, machine.seed + r) for r in range(n)]
    memory = Memory(data, per_element=False)
    calls = []
    for rank in range(n):
        one = memory.lay(xs[rank]) if op == "gather" else memory.empty(xs[rank])
        every = [(memory.empty if op == "gather" else memory.lay)(x) for x in xs]
        of_root = [one if r == root else one[:0] for r in range(n)]
        of_all = every if rank == root else [x[:0] for x in every]
        ins, outs = (of_root, of_all) if op == "gather" else (of_all, of_root)
        calls.append(RankCall(op, dtype, ins, outs, root=root, has_counts=True))
    play_all(play, machine, calls)
    if op == "gather":
        for got, want in zip(calls[root].outs, xs, strict=True):
            assert_bits(got, want)
    else:
        for rank, call in enumerate(calls):
            assert_bits(call.outs[root], xs[rank])


def series(
    machine: Machine, num_calls: int, dtype: torch.dtype = torch.float32, scale: int = 1
) -> Any:
    """Calls of all kinds and sizes one after the other; with what each must have in its outputs."""
    n = machine.world_size
    calls: list[list[RankCall]] = [[] for _ in range(n)]
    wants: list[list[list[Tensor]]] = []
    for i in range(num_calls):
        numel = (7 + 131 * i * i) % 700 * scale
        xs = [[values(numel, dtype, i + 9 * s + r) for r in range(n)] for s in range(n)]
        first = [parts[0] for parts in xs]
        empties = [[torch.empty(numel, dtype=dtype) for _ in range(n)] for _ in range(n)]
        op = ["all_reduce", "all_gather", "barrier", "reduce_scatter", "all_to_all"][i % 5]
        wants.append([])
        for r in range(n):
            if op == "barrier":
                call, want = RankCall(op), []
            elif op == "all_reduce":
                call = RankCall(op, dtype, [xs[r][0].clone()], [empties[r][0]], "sum")
                want = [reference.reduce(first)]
            elif op == "all_gather":
                call, want = RankCall(op, dtype, [xs[r][0]] * n, empties[r]), first
            elif op == "reduce_scatter":
                call = RankCall(op, dtype, xs[r], [empties[r][0]], "sum")
                want = [reference.reduce([parts[r] for parts in xs])]
            else:
                call, want = RankCall(op, dtype, xs[r], empties[r]), [parts[r] for parts in xs]
            calls[r].append(call)
            wants[-1].append(want)
    return calls, wants


def assert_series(calls: Any, wants: Any, until: int) -> None:
    for i in range(until):
        for r, rank_calls in enumerate(calls):
            for got, want in zip(rank_calls[i].outs, wants[i][r], strict=True):
                assert_bits(got, want)


CHECKS: dict[str, tuple[int, list[Any], Callable[..., None]]] = {
    "all_reduce": (30, REDUCED, check_all_reduce),
    "reduce_scatter": (25, REDUCED, check_reduce_scatter),
    "all_gather": (20, MOVED, check_all_gather),
    "all_to_all": (10, MOVED, check_all_to_all),
    "broadcast": (5, MOVED, check_broadcast),
    "reduce": (5, REDUCED, check_reduce),
    "gather_scatter": (5, MOVED, check_gather_scatter),
}
"""Of an operation: its share of all cases in percent, its dtypes (and reductions), its check."""


def check_cases(op: str, play: Play, num_cases: int) -> None:
    """Plays its share of ``num_cases`` random cases of an operation."""
    percent, kinds, check = CHECKS[op]

    @settings(
        max_examples=max(10, num_cases * percent // 100),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(machine=machines(), kind=st.sampled_from(kinds), data=st.data())
    def every_case(machine: Machine, kind: Any, data: st.DataObject) -> None:
        check(play, machine, kind, data)

    every_case()
