"""Random collectives: values of every kind, layouts, sizes around every limit, arrival, placement.

A case says what all ranks do; ``laid`` puts values into awkward memory, ``bits`` compares them.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
COMPLEX = [torch.complex64, torch.complex128]
BYTES = [  # types that need only be moved
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
MOVED = [*FLOATS, *INTEGERS, *COMPLEX, torch.bool, *BYTES]
OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "band": dist.ReduceOp.BAND,
    "bor": dist.ReduceOp.BOR,
    "bxor": dist.ReduceOp.BXOR,
}
FLOAT_OPS = ["sum", "avg", "product", "min", "max"]
INTEGER_OPS = ["sum", "product", "min", "max", "band", "bor", "bxor"]
REDUCED = [  # every reduction that must work
    *((d, o) for d in FLOATS for o in FLOAT_OPS),
    *((d, o) for d in INTEGERS for o in INTEGER_OPS),
    *((torch.bool, o) for o in INTEGER_OPS),
    *((d, o) for d in COMPLEX for o in ("sum", "avg")),
]
KIB = 1024
LIMITS_NBYTES = [64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 2048 * KIB]
LAYOUTS = ["plain", "offset", "misaligned", "every second", "transposed"]
SOURCE_LAYOUTS = [*LAYOUTS, "expanded", "negated"]


@dataclass(frozen=True)
class Case:
    """One collective of all ranks.

    ``numels[r]`` counts rank r's elements where ranks may differ; ``numel`` is ``numels[0]``.
    ``delays_us[r]`` lets rank r come late; with ``placement`` rank r runs on that CPU and the
    ones after it. ``staging`` is PRIMITIVES_STAGING.
    """

    form: str
    world_size: int
    dtype: torch.dtype
    op: str
    numels: tuple[int, ...]
    source: str
    target: str
    root: int
    queued: bool
    delays_us: tuple[int, ...]
    placement: int | None
    staging: str
    seed: int

    @property
    def numel(self) -> int:
        return self.numels[0]


@st.composite
def numels(draw: st.DrawFn, itemsize: int, world_size: int) -> int:
    """Mostly few; else within one of a limit, for one rank's part or for all parts together."""
    if draw(st.integers(0, 7)):
        return draw(st.integers(0, 70))
    limit = draw(st.sampled_from(LIMITS_NBYTES)) // itemsize
    parts = draw(st.sampled_from([1, world_size]))
    return limit // parts + draw(st.integers(-1, 1))


@st.composite
def cases(draw: st.DrawFn, forms: list[str], reduces: bool) -> Case:
    """Cases of one collective; lists get parts of different sizes."""
    world_size = draw(st.integers(1, 8))
    if reduces:
        dtype, op = draw(st.sampled_from(REDUCED))
    else:
        dtype, op = draw(st.sampled_from(MOVED)), "sum"
    form = draw(st.sampled_from(forms))
    sizes = numels(dtype.itemsize, world_size)
    if form in ("list", "splits"):
        drawn = tuple(draw(sizes) for _ in range(world_size))
    else:
        drawn = (draw(sizes),) * world_size
    late = draw(st.integers(0, 3)) == 0
    delay = st.sampled_from([0, 0, 50, 2000])
    return Case(
        form=form,
        world_size=world_size,
        dtype=dtype,
        op=op,
        numels=drawn,
        source=draw(st.sampled_from(SOURCE_LAYOUTS)),
        target=draw(st.sampled_from(LAYOUTS)),
        root=draw(st.integers(0, world_size - 1)),
        queued=draw(st.booleans()),
        delays_us=tuple(draw(delay) if late else 0 for _ in range(world_size)),
        placement=draw(st.sampled_from([None, None, 0, 1])),
        staging=draw(st.sampled_from(["auto", "stream"])),
        seed=draw(st.integers(0, 2**20)),
    )


def values(numel: int, dtype: torch.dtype, seed: int, how: str = "plain") -> Tensor:
    """Any bits for types that are moved; wide exponents, signed zeros, inf and NaN for floats.

    What will be laid out as ``expanded`` is one value many times.
    """
    if how == "expanded" and numel > 1:
        return values(1, dtype, seed).expand(numel).contiguous()
    generator = torch.Generator().manual_seed(seed)
    if dtype in BYTES:
        nbytes = numel * dtype.itemsize
        return torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8).view(dtype)
    if dtype == torch.bool:
        return torch.rand(numel, generator=generator) < 0.5
    if not (dtype.is_floating_point or dtype.is_complex):
        info = torch.iinfo(dtype)
        high = min(info.max, 2**62)
        return torch.randint(max(info.min, -high), high, (numel,), generator=generator, dtype=dtype)
    x = torch.randn(numel, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(torch.randint(-30, 20, (numel,), generator=generator).double())
    kind = torch.randint(0, 40, (numel,), generator=generator)
    for i, special in enumerate((0.0, -0.0, float("inf"), float("-inf"), float("nan"))):
        x = torch.where(kind == i, special, x)
    return torch.complex(x, x.flip(0)).to(dtype) if dtype.is_complex else x.to(dtype)


def exact_values(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Small integers: sums of eight are exact in every type, so their order cannot matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (numel,), generator=generator).to(dtype)


def laid(x: Tensor, how: str) -> Tensor:
    """The values of 1-D ``x`` in other memory; the shape may change, the order of elements not."""
    numel = x.numel()
    if numel == 0 or how == "plain":
        return x.clone()
    if how == "misaligned" and x.dtype.is_complex:
        how = "offset"  # torch itself crashes on misaligned complex numbers
    if how == "offset":
        view = torch.zeros(numel + 3, dtype=x.dtype)[3:]
    elif how == "misaligned":
        memory = bytearray(numel * x.itemsize + 1)
        view = torch.frombuffer(memory, dtype=x.dtype, offset=1, count=numel)
    elif how == "every second":
        view = torch.zeros(2 * numel, dtype=x.dtype)[::2]
    elif how == "transposed":
        if numel == 1:
            return x.clone().reshape(())
        rows = next((k for k in (2, 3, 5) if numel % k == 0), 1)
        view = torch.zeros(numel // rows, rows, dtype=x.dtype).t()
        x = x.reshape(rows, -1)
    elif how == "expanded":
        return x[:1].clone().expand(numel)
    elif x.dtype.is_complex and x.dtype != torch.complex32:
        return torch.conj_physical(x).conj()
    elif x.dtype in (torch.float32, torch.float64):
        return torch._neg_view(-x)
    else:
        return x.clone()
    return view.copy_(x)


def bits(x: Tensor) -> Tensor:
    """The bits as integers, every NaN of the types that we compute with as one."""
    x = x.detach().resolve_conj().resolve_neg().reshape(-1)
    if x.dtype == torch.complex32:
        # One element is contiguous with any stride; to view it, the stride must be 1.
        x = x.clone(memory_format=torch.contiguous_format).view(torch.float16)
    elif x.dtype.is_complex:
        x = torch.view_as_real(x).reshape(-1)
    if x.dtype in FLOATS:
        x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integer[x.element_size()])


def assert_bits(got: Tensor, expected: Tensor) -> None:
    """Equal dtype, number of elements and bits; names the first element that differs."""
    assert got.dtype == expected.dtype
    assert got.numel() == expected.numel()
    a, b = bits(got), bits(expected)
    if not torch.equal(a, b):
        differing = (a != b).nonzero().flatten()
        i = int(differing[0])
        raise AssertionError(
            f"{len(differing)} of {len(a)} words differ, first [{i}]: {a[i]:#x}, not {b[i]:#x}"
        )
