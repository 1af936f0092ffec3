"""The CUDA collectives on emulated ranks: buffers in, buffers out (tests/emulator/)."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from emulators import build
from torch import Tensor

MAX_RANKS, LETTER_WORDS = 8, 6
MAX_CHUNKS, CHUNK_SHIFT = 16, 40
NOT_SYMMETRIC = 2**64 - 1
# Values of the enums in csrc/transport/operations.hpp and csrc/collectives/dtype.hpp.
OPS = {"all_gather": 1, "reduce_scatter": 2, "all_reduce": 3, "all_to_all": 4, "broadcast": 5}
OPS |= {"reduce": 6, "gather": 7, "scatter": 8, "barrier": 9}
OPS |= {"fused all_gather": 12, "fused reduce_scatter": 13}
REDUCE_OPS = ["none", "sum", "avg", "premul_sum", "product", "min", "max", "band", "bor", "bxor"]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]
MISTAKES = ["none", "relaxed flag", "missing sync", "lost flags", "wrong index"]
SIZES = [
    "max_blocks",
    "slot_nbytes",
    "block_nbytes",
    "one_shot_nbytes",
    "direct_nbytes",
    "timeout_ns",
]
FAILURES = ["none", "timeout", "mismatch", "told", "aborted"]

Pointers = ctypes.c_void_p * MAX_RANKS
Sizes = ctypes.c_uint64 * MAX_RANKS
Words = ctypes.c_uint64 * LETTER_WORDS


class Status(ctypes.Structure):
    """primitives_cuda_status."""

    _fields_ = (
        ("state", ctypes.c_uint32),
        ("abort", ctypes.c_uint32),
        ("failure", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("missing", ctypes.c_uint32),
        ("peer", ctypes.c_int32),
        ("op", ctypes.c_uint32),
        ("seq", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("epoch", ctypes.c_uint32),
        ("mine", Words),
        ("theirs", Words),
        ("uploaded", ctypes.c_uint32),
        ("num_direct", ctypes.c_uint32),
    )


class Ranks(ctypes.Structure):
    """primitives_cuda_ranks."""

    _fields_ = (
        ("rank", ctypes.c_int32),
        ("world_size", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("slot_nbytes", ctypes.c_uint32),
        ("block_nbytes", ctypes.c_uint32),
        ("one_shot_nbytes", ctypes.c_uint32),
        ("direct_nbytes", ctypes.c_uint32),
        ("segments", Pointers),
        ("chunks", ctypes.c_void_p * MAX_CHUNKS * MAX_RANKS),
        ("status", ctypes.POINTER(Status)),
        ("timeout_ns", ctypes.c_uint64),
    )


class Many(ctypes.Structure):
    """primitives_cuda_many."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("upload", ctypes.c_void_p),
        ("upload_nbytes", ctypes.c_uint64),
        ("digest", ctypes.c_uint64),
        ("num_tensors", ctypes.c_uint32),
        ("from_", ctypes.c_uint8),
        ("to", ctypes.c_uint8),
        ("in_itemsize", ctypes.c_uint8),
        ("out_itemsize", ctypes.c_uint8),
        ("accumulate", ctypes.c_uint8),
        ("squares", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
    )


class Call(ctypes.Structure):
    """primitives_cuda_call."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("dtype", ctypes.c_uint8),
        ("reduce_op", ctypes.c_uint8),
        ("has_counts", ctypes.c_uint8),
        ("root", ctypes.c_int32),
        ("seq", ctypes.c_uint32),
        ("num_blocks", ctypes.c_int32),
        ("factor", ctypes.c_double),
        ("place", ctypes.c_uint64),
        ("in_", Pointers),
        ("in_nbytes", Sizes),
        ("out", Pointers),
        ("out_nbytes", Sizes),
        ("many", Many),
    )


class Region(ctypes.Structure):
    """Memory that the device code may touch."""

    _fields_ = (("begin", ctypes.c_void_p), ("nbytes", ctypes.c_uint64))


class EmulatedRun(ctypes.Structure):
    """As in tests/emulator/collectives.cpp."""

    _fields_ = (
        ("num_lanes", ctypes.c_int32),
        ("num_calls", ctypes.c_int32),
        ("room", ctypes.c_int32),
        ("dead_rank", ctypes.c_int32),
        ("dead_from", ctypes.c_int32),
        ("mistake", ctypes.c_int32),
        ("mistake_at", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
    )


class DeviceCodeWrong(AssertionError):
    """A race, an access out of bounds or misaligned, a call that prepare() refuses, or no end."""


@cache
def library() -> ctypes.CDLL:
    """Built on first use."""
    return build("collectives")


@dataclass(frozen=True)
class Machine:
    """How the ranks run."""

    world_size: int
    num_lanes: int = 16
    max_blocks: int = 3
    slot_nbytes: int = 512
    block_nbytes: int = 512
    one_shot_nbytes: int = 1024
    direct_nbytes: int = 256
    room: int = 64
    timeout_ns: int = 10**9
    """In emulated time: a switch from block to block is 1 us."""
    seed: int = 0
    dead_rank: int = -1
    dead_from: int = 0
    mistake: str = "none"
    mistake_at: int = 0


@dataclass
class RankCall:
    """One collective of one rank: tensors that are flat and contiguous, of any alignment."""

    op: str
    dtype: torch.dtype = torch.uint8
    ins: Sequence[Tensor] = ()
    """To each rank; all_reduce and broadcast: one."""
    outs: Sequence[Tensor] = ()
    """From each rank; all_reduce, reduce_scatter and broadcast: one."""
    reduce_op: str = "none"
    factor: float = 0.0
    root: int = -1
    has_counts: bool = False
    heap: Tensor | None = None
    """The chunk of symmetric memory in which the inputs lie, which the peers may then read."""
    chunk: int = 0
    """... and its number on this rank."""

    def memory(self) -> list[Tensor]:
        """All that the device code may touch."""
        return [*self.ins, *self.outs, *([] if self.heap is None else [self.heap])]

    def place_of(self, x: Tensor) -> int:
        """Of a tensor in the heap."""
        assert self.heap is not None
        return x.data_ptr() - self.heap.data_ptr() | self.chunk << CHUNK_SHIFT

    def native(self, seq: int) -> Call:
        """As the device code wants it."""
        call = Call()
        call.op = OPS[self.op]
        # What is moved as bytes has a number of its own, that only needs to be equal on all ranks.
        call.dtype = DTYPES.index(self.dtype) if self.reduce_op != "none" else 100
        call.reduce_op = REDUCE_OPS.index(self.reduce_op)
        call.has_counts = self.has_counts
        call.root, call.seq, call.factor = self.root, seq, self.factor
        call.place = NOT_SYMMETRIC
        if self.heap is not None:
            call.place = self.place_of(self.ins[0])
        for i, x in enumerate(self.ins):
            call.in_[i], call.in_nbytes[i] = x.data_ptr(), x.numel() * x.itemsize
        for i, x in enumerate(self.outs):
            call.out[i], call.out_nbytes[i] = x.data_ptr(), x.numel() * x.itemsize
        return call


@dataclass
class Failure:
    """What a rank's kernels have reported."""

    failure: str
    rank: int
    missing: list[int]
    peer: int
    op: str
    seq: int
    mine: list[int] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, status: Status) -> "Failure | None":
        if status.state == 0:
            return None
        assert status.state == 2
        return cls(
            FAILURES[status.failure],
            status.rank,
            [r for r in range(MAX_RANKS) if status.missing >> r & 1],
            status.peer,
            next(name for name, number in OPS.items() if number == status.op),
            status.seq,
            list(status.mine),
            list(status.theirs),
        )


@dataclass
class Arrays:
    """The calls of all ranks, as C sees them."""

    num_calls: int
    ranks: "ctypes.Array[Ranks]"
    calls: "ctypes.Array[Call]"
    regions: "ctypes.Array[Region]"
    statuses: list[Status]

    @classmethod
    def of(
        cls, machine: Machine, calls: Sequence[Sequence[RankCall]], aborting: Sequence[int]
    ) -> "Arrays":
        n, num_calls = machine.world_size, len(calls[0])
        assert all(len(rank_calls) == num_calls for rank_calls in calls)
        statuses = [Status(abort=int(r in aborting)) for r in range(n)]
        heaps = [{c.chunk: c.heap for c in own if c.heap is not None} for own in calls]
        ranks = (Ranks * n)()
        for r in range(n):
            ranks[r].rank, ranks[r].world_size = r, n
            for name in SIZES:
                setattr(ranks[r], name, getattr(machine, name))
            ranks[r].status = ctypes.pointer(statuses[r])
            for s, chunks in enumerate(heaps):
                for chunk, heap in chunks.items():
                    ranks[r].chunks[s][chunk] = heap.data_ptr()
        nbytes_at: dict[int, int] = {}
        for call in (call for rank_calls in calls for call in rank_calls):
            for x in call.memory():
                nbytes = x.numel() * x.itemsize
                nbytes_at[x.data_ptr()] = max(nbytes, nbytes_at.get(x.data_ptr(), 0))
        regions = [Region(at, nbytes) for at, nbytes in nbytes_at.items()]
        native = [call.native(i) for rank_calls in calls for i, call in enumerate(rank_calls)]
        return cls(
            num_calls,
            ranks,
            (Call * len(native))(*native),
            (Region * len(regions))(*regions),
            statuses,
        )


def emulate(machine: Machine, arrays: Arrays, report: "ctypes.Array[ctypes.c_char]") -> int:
    """Plays them on the emulation; 0, or 1 with the report of what went wrong."""
    run = EmulatedRun(
        machine.num_lanes,
        arrays.num_calls,
        machine.room,
        machine.dead_rank,
        machine.dead_from,
        MISTAKES.index(machine.mistake),
        machine.mistake_at,
        machine.seed,
    )
    code: int = library().emulate(
        ctypes.byref(run),
        arrays.ranks,
        arrays.calls,
        arrays.regions,
        len(arrays.regions),
        report,
        len(report),
    )
    return code


Run = Callable[[Machine, Arrays, "ctypes.Array[ctypes.c_char]"], int]


def play(
    machine: Machine,
    calls: Sequence[Sequence[RankCall]],
    aborting: Sequence[int] = (),
    run: Run = emulate,
) -> list[Failure | None]:
    """Plays ``calls[rank]`` one after the other on every rank; the outputs are written in place.

    Args:
        machine: how the ranks run.
        calls: equally many for each rank.
        aborting: ranks whose host asks their kernels to give up.
        run: where.

    Returns:
        What each rank reports.

    Raises:
        DeviceCodeWrong: the device code did what it must never do.
    """
    arrays = Arrays.of(machine, calls, aborting)
    report = ctypes.create_string_buffer(300)
    if run(machine, arrays, report) != 0:
        raise DeviceCodeWrong(report.value.decode())
    return [Failure.of(status) for status in arrays.statuses]


def misaligned(x: Tensor, nbytes: int) -> Tensor:
    """A copy of flat ``x`` that begins ``nbytes`` bytes after a multiple of 16."""
    size = x.numel() * x.itemsize
    memory = torch.empty(size + 48, dtype=torch.uint8)
    begin = -memory.data_ptr() % 16 + nbytes
    if size == 0:
        return x.clone()
    view = torch.frombuffer(memory.numpy(), dtype=x.dtype, offset=begin, count=x.numel())
    return view.copy_(x)


FOUND_AS = [
    ("relaxed flag", {"race"}),
    ("missing sync", {"race"}),
    ("lost flags", {"timeout"}),
    ("wrong index", {"wrong bits", "outside", "misaligned", "race", "timeout", "mismatch"}),
]
"""What a machine can be told to do wrong, and how that may be found."""


def outcome(
    machine: Machine, calls: Sequence[Sequence[RankCall]], assert_right: Callable[[], None]
) -> str:
    """What becomes of the calls: right, or how they are found to be wrong."""
    try:
        found = play(machine, calls)
    except DeviceCodeWrong as wrong:
        return str(wrong)
    if any(found):
        return next(f.failure for f in found if f is not None and f.failure != "told")
    try:
        assert_right()
    except AssertionError:
        return "wrong bits"
    return "right"


def check_found(outcomes: list[str], expected: set[str]) -> None:
    """Of a mistake at many places some must be found, as expected, and none in another way."""
    caught = [one for one in outcomes if any(word in one for word in expected)]
    assert set(outcomes) - set(caught) <= {"right"}, outcomes
    assert len(caught) >= 4, outcomes
