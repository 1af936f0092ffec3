"""Every collective against primitives.reference, bit for bit: dtypes, ops, sizes, strides."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ThreadRanks
from torch import Tensor

from primitives import reference

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
COMPLEX = [torch.complex64, torch.complex128]
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
CASES = [
    *((d, o) for d in FLOATS for o in FLOAT_OPS),
    *((d, o) for d in INTEGERS for o in INTEGER_OPS),
    *((torch.bool, o) for o in INTEGER_OPS),
    *((d, o) for d in COMPLEX for o in ("sum", "avg")),
]
# Around the kernels' blocks (512 elements), chunks (128 KiB) and the switch of algorithms (64 KiB).
NUMELS = st.one_of(st.integers(0, 70), st.sampled_from([511, 513, 16384, 16385, 40_001, 140_001]))


# A letter for the host of each rank: one host; several, of equal and unequal size, also mixed up.
@pytest.fixture(scope="module", params=["aa", "aaa", "aaaa", "aabb", "aaab", "abbc", "abab"])
def ranks(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    group = ThreadRanks(len(request.param), hosts=request.param)
    yield group
    group.close()


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values of every kind: random bits for integers; wide exponents, signed zeros, inf and NaN."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not (dtype.is_floating_point or dtype.is_complex):
        info = torch.iinfo(dtype)
        high = min(info.max, 2**62)
        return torch.randint(max(info.min, -high), high, shape, generator=generator, dtype=dtype)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(torch.randint(-30, 20, shape, generator=generator).double())
    if dtype.is_complex:
        return torch.complex(x, x.flip(0)).to(dtype)
    kind = torch.randint(0, 40, shape, generator=generator)
    for i, special in enumerate((0.0, -0.0, float("inf"), float("-inf"), float("nan"))):
        x = torch.where(kind == i, special, x)
    return x.to(dtype)


def bits(x: Tensor) -> Tensor:
    """The bits, every NaN as one."""
    x = torch.view_as_real(x) if x.is_complex() else x
    if not x.is_floating_point():
        return x
    x = torch.where(x.isnan(), torch.full_like(x, float("nan")), x).contiguous()
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(bits(got), bits(expected)), (got, expected)


def strided(x: Tensor, how: int) -> Tensor:
    """The same values in other strides: 0 contiguous, 1 every second element, 2 transposed."""
    if how == 0:
        return x.clone()
    if how == 1:
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
        view = wide[..., ::2]
    else:
        view = torch.empty(tuple(reversed(x.shape)), dtype=x.dtype).permute(
            *reversed(range(x.dim()))
        )
    view.copy_(x)
    return view


def options(kind: Any, **fields: Any) -> Any:
    made = kind()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CASES), NUMELS, st.integers(0, 2), st.booleans(), st.integers(0, 999))
def test_all_reduce(
    ranks: ThreadRanks, case: Any, numel: int, how: int, queued: bool, seed: int
) -> None:
    dtype, op = case
    xs = [draw((numel,), dtype, seed + r) for r in range(ranks.world_size)]
    expected = reference.all_reduce(xs, op)

    def call(backend: Any, rank: int) -> Tensor:
        x = strided(xs[rank], how)
        settings = options(dist.AllreduceOptions, reduceOp=OPS[op], asyncOp=queued)
        backend.allreduce([x], settings).wait()
        return x

    for got, want in zip(ranks(call), expected, strict=True):
        assert_bits(got, want)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(CASES), NUMELS, st.integers(0, 2), st.booleans(), st.integers(0, 999))
def test_reduce_scatter(
    ranks: ThreadRanks, case: Any, numel: int, how: int, lists: bool, seed: int
) -> None:
    dtype, op = case
    n = ranks.world_size
    sizes = [numel + 3 * r if lists else numel for r in range(n)]
    xs = [
        [draw((size,), dtype, seed + 9 * s + r) for r, size in enumerate(sizes)] for s in range(n)
    ]
    expected = reference.reduce_scatter(xs, op)

    def call(backend: Any, rank: int) -> Tensor:
        out = strided(torch.zeros_like(expected[rank]), how)
        settings = options(dist.ReduceScatterOptions, reduceOp=OPS[op])
        if lists:
            backend.reduce_scatter([out], [[strided(x, how) for x in xs[rank]]], settings).wait()
        else:
            backend._reduce_scatter_base(out, strided(torch.cat(xs[rank]), how), settings).wait()
        return out

    for got, want in zip(ranks(call), expected, strict=True):
        assert_bits(got, want)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*FLOATS, *INTEGERS, *COMPLEX, torch.bool, torch.float8_e4m3fn]),
    NUMELS,
    st.integers(0, 2),
    st.sampled_from(["tensor", "list", "in place"]),
    st.integers(0, 999),
)
def test_all_gather(
    ranks: ThreadRanks, dtype: Any, numel: int, how: int, form: str, seed: int
) -> None:
    n = ranks.world_size
    source = torch.uint8 if dtype == torch.float8_e4m3fn else dtype
    xs = [
        draw((numel + (5 * r if form == "list" else 0),), source, seed + r).view(dtype)
        for r in range(n)
    ]

    def call(backend: Any, rank: int) -> list[Tensor]:
        x = strided(xs[rank], how)
        out = torch.zeros(n * numel, dtype=source).view(dtype)
        if form == "list":
            outs = [strided(torch.empty_like(y), how) for y in xs]
            backend.allgather([outs], [x]).wait()
            return outs
        if form == "in place":
            out.view(n, numel)[rank].copy_(x)
            x = out[rank * numel : (rank + 1) * numel]
        backend._allgather_base(out, x).wait()
        return list(out.view(n, numel))

    for got in ranks(call):
        for y, want in zip(got, xs, strict=True):
            assert_bits(y.view(source), want.view(source))


@settings(max_examples=8, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.int64, torch.bfloat16]), st.booleans())
def test_all_to_all(ranks: ThreadRanks, data: st.DataObject, dtype: Any, lists: bool) -> None:
    n = ranks.world_size
    sizes = [
        [data.draw(st.sampled_from([0, 1, 7, 20_001, 40_000])) for _ in range(n)] for _ in range(n)
    ]
    xs = [[draw((sizes[s][r],), dtype, 9 * s + r) for r in range(n)] for s in range(n)]
    expected = reference.all_to_all(xs)

    def call(backend: Any, rank: int) -> Tensor:
        if lists:
            outs = [torch.empty_like(x) for x in expected[rank]]
            backend.alltoall(outs, xs[rank]).wait()
            return torch.cat(outs)
        out = torch.empty(sum(sizes[s][rank] for s in range(n)), dtype=dtype)
        received = [sizes[s][rank] for s in range(n)]
        backend.alltoall_base(out, torch.cat(xs[rank]), received, sizes[rank]).wait()
        return out

    for got, want in zip(ranks(call), expected, strict=True):
        assert_bits(got, torch.cat(want))


@settings(max_examples=12, deadline=None)
@given(NUMELS, st.integers(0, 1), st.integers(0, 2), st.sampled_from([torch.float32, torch.int8]))
def test_rooted(ranks: ThreadRanks, numel: int, root: int, how: int, dtype: Any) -> None:
    n = ranks.world_size
    xs = [draw((numel,), dtype, r) for r in range(n)]

    def call(backend: Any, rank: int) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        sent, summed, out = (strided(x, how) for x in (xs[rank], xs[rank], xs[root]))
        backend.broadcast([sent], options(dist.BroadcastOptions, rootRank=root)).wait()
        backend.reduce([summed], options(dist.ReduceOptions, rootRank=root)).wait()
        outs = [strided(torch.zeros_like(x), how) for x in xs] if rank == root else []
        gathered = [outs] if rank == root else []
        backend.gather(gathered, [xs[rank]], options(dist.GatherOptions, rootRank=root)).wait()
        parts = [[strided(x, how) for x in xs]] if rank == root else []
        backend.scatter([out], parts, options(dist.ScatterOptions, rootRank=root)).wait()
        return sent, summed, outs, out

    for rank, (sent, summed, outs, out) in enumerate(ranks(call)):
        assert_bits(sent, xs[root])
        assert_bits(out, xs[rank])
        assert_bits(summed, reference.reduce(xs) if rank == root else xs[rank])
        for got, want in zip(outs, xs, strict=False):
            assert_bits(got, want)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(FLOATS), NUMELS, st.floats(-4, 4, width=16))
def test_premultiplied_sum(ranks: ThreadRanks, dtype: Any, numel: int, factor: float) -> None:
    xs = [draw((numel,), dtype, r) for r in range(ranks.world_size)]
    op = dist._make_nccl_premul_sum(factor)

    def call(backend: Any, rank: int) -> Tensor:
        x = xs[rank].clone()
        backend.allreduce([x], options(dist.AllreduceOptions, reduceOp=op)).wait()
        return x

    for got in ranks(call):
        assert_bits(got, reference.reduce(xs, "premul_sum", factor))


def test_every_half_value_survives_the_rounding(ranks: ThreadRanks) -> None:
    """x + 0 for all 65536 bit patterns: subnormals, infinities and signed zeros included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        xs = [every.view(dtype) if r == 0 else torch.zeros(2**16, dtype=dtype) for r in range(9)]
        xs = xs[: ranks.world_size]

        def call(backend: Any, rank: int, xs: list[Tensor] = xs) -> Tensor:
            x = xs[rank].clone()
            backend.allreduce([x]).wait()
            return x

        for got in ranks(call):
            assert_bits(got, reference.reduce(xs))


def test_the_reference_tree_carries_the_odd_one_up() -> None:
    order = reference.tree([torch.tensor(i) for i in range(5)], lambda a, b: a * 10 + b)
    assert order.item() == (1 * 10 + 23) * 10 + 4
    xs = [torch.tensor([x]) for x in (1e8, 1.0, -1e8, 1.0)]
    assert reference.reduce(xs).item() == 0.0
    assert sum(xs).item() == 1.0  # one after the other
