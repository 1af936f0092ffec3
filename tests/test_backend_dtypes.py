"""Every dtype and every kind of tensor: right, or refused before anybody is harmed."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ThreadRanks
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from primitives import errors, reference

NUM_RANKS = 3


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadRanks]:
    group = ThreadRanks(NUM_RANKS)
    yield group
    group.close()


def all_dtypes() -> list[torch.dtype]:
    """Every dtype of this torch that a plain tensor can have."""
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    plain = []
    for dtype in sorted(found, key=str):
        try:
            if not torch.empty(1, dtype=dtype).is_quantized:
                plain.append(dtype)
        except RuntimeError:  # quantized ones need a scale
            continue
    return plain


DTYPES = all_dtypes()


def test_the_list_of_dtypes_is_long() -> None:
    names = {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    assert names >= {"bool", "bfloat16", "complex32", "float8_e4m3fn", "uint16", "uint64"}


def random_bytes(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    nbytes = numel * torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, high, (nbytes,), generator=generator, dtype=torch.uint8).view(dtype)


def as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor; torch cannot even copy some dtypes."""
    return x.view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from([0, 1, 7, 20_001]), st.integers(0, 99))
def test_bytes_move_unchanged(
    ranks: ThreadRanks, dtype: torch.dtype, numel: int, seed: int
) -> None:
    xs = [random_bytes(numel, dtype, 9 * seed + r) for r in range(NUM_RANKS)]

    def call(backend: Any, rank: int) -> None:
        x = xs[rank]
        full = torch.empty(NUM_RANKS * numel, dtype=dtype)
        backend._allgather_base(full, x).wait()
        assert torch.equal(as_bytes(full), torch.cat([as_bytes(y) for y in xs]))
        back = torch.empty_like(full)
        backend.alltoall_base(back, full, [], []).wait()
        assert torch.equal(as_bytes(back), as_bytes(xs[rank]).repeat(NUM_RANKS))
        mine = as_bytes(x).clone().view(dtype)
        backend.broadcast([mine]).wait()
        assert torch.equal(as_bytes(mine), as_bytes(xs[0]))
        sent = backend.send([x], (rank + 1) % NUM_RANKS, 0)
        received = torch.empty_like(x)
        backend.recv([received], (rank - 1) % NUM_RANKS, 0).wait()
        assert torch.equal(as_bytes(received), as_bytes(xs[rank - 1]))
        sent.wait()

    ranks(call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_strided_tensors(ranks: ThreadRanks, dtype: torch.dtype) -> None:
    """Every other element of a matrix of twice the width, as it is and as it becomes."""
    xs = [random_bytes(24, dtype, r) for r in range(NUM_RANKS)]

    def spread(x: Tensor) -> Tensor:
        """x in every other place; each element's bytes are set one by one."""
        wide = torch.zeros(2 * x.numel(), x.element_size(), dtype=torch.uint8)
        wide[::2] = as_bytes(x).view(-1, x.element_size())
        return wide.view(-1).view(dtype)[::2]

    def gathered_bytes(x: Tensor) -> Tensor:
        base = torch.empty(0, dtype=dtype).set_(x.untyped_storage())
        return as_bytes(base).view(-1, x.element_size())[::2].reshape(-1)

    def call(backend: Any, rank: int) -> None:
        outs = [spread(torch.zeros_like(as_bytes(x)).view(dtype)) for x in xs]
        backend.allgather([outs], [spread(xs[rank])]).wait()
        for out, x in zip(outs, xs, strict=True):
            assert torch.equal(gathered_bytes(out), as_bytes(x))

    ranks(call)


SUMMED = {
    torch.bool,
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_is_the_tree_or_refused(ranks: ThreadRanks, dtype: torch.dtype) -> None:
    xs = [random_bytes(1000, dtype, r) for r in range(NUM_RANKS)]

    def call(backend: Any, rank: int) -> Tensor | None:
        x = as_bytes(xs[rank]).clone().view(dtype)
        if dtype in SUMMED:
            backend.allreduce([x]).wait()
            return x
        with pytest.raises(ValueError, match="sum is not defined for"):
            backend.allreduce([x])
        return None

    results = ranks(call)
    if dtype not in SUMMED:
        return
    if dtype.is_complex:  # two floats
        part = {torch.complex32: torch.float16, torch.complex64: torch.float32}
        as_floats = part.get(dtype, torch.float64)
        xs = [x.view(as_floats) for x in xs]
        results = [x.view(as_floats) for x in results]
    elif dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch.add does not know
        signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        xs, results = [x.view(signed) for x in xs], [x.view(signed) for x in results]
    expected = reference.reduce(xs)
    for result in results:
        same = result == expected
        if dtype.is_floating_point or dtype.is_complex:
            same |= result.isnan() & expected.isnan()
        assert bool(same.all())


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_numbers_compare_unsigned(ranks: ThreadRanks, dtype: torch.dtype) -> None:
    xs = [random_bytes(1000, dtype, r) for r in range(NUM_RANKS)]
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX

    def call(backend: Any, rank: int) -> Tensor:
        x = xs[rank].clone()
        backend.allreduce([x], options).wait()
        return x

    for result in ranks(call):
        for got, *values in zip(*(x.tolist() for x in (result, *xs)), strict=True):
            assert got == max(values)


def misaligned(x: Tensor) -> Tensor:
    """The same values, one byte behind where their type may start."""
    memory = torch.empty(x.nbytes + 64, dtype=torch.uint8)
    memory[1 : 1 + x.nbytes] = x.view(torch.uint8)
    made = torch.frombuffer(memory.numpy(), dtype=x.dtype, count=x.numel(), offset=1)
    assert made.data_ptr() % x.element_size() != 0
    return made


@pytest.mark.parametrize("queued", [False, True])
def test_misaligned_tensors(ranks: ThreadRanks, queued: bool) -> None:
    xs = [torch.randn(2001, dtype=torch.float64) for _ in range(NUM_RANKS)]
    options = dist.AllreduceOptions()
    options.asyncOp = queued

    def call(backend: Any, rank: int) -> None:
        x = misaligned(xs[rank])
        full = misaligned(torch.zeros(NUM_RANKS * 2001, dtype=torch.float64))
        backend._allgather_base(full, x).wait()
        assert torch.equal(full, torch.cat(xs))
        backend.allreduce([x], options).wait()
        assert torch.equal(x, reference.reduce(xs))

    ranks(call)


def queue(kind: Any) -> Any:
    made = kind()
    made.asyncOp = True
    return made


def test_queued_collectives_on_one_strided_tensor_see_each_other(ranks: ThreadRanks) -> None:
    """[Note: staged tensors] A collective reads what the one before it in the queue has written."""
    num = 5

    def call(backend: Any, rank: int) -> None:
        x = torch.ones(300, 2)[:, 0]
        works = [backend.allreduce([x], queue(dist.AllreduceOptions)) for _ in range(num)]
        full = torch.empty(NUM_RANKS * 300, 2)[:, 1]
        works.append(backend._allgather_base(full, x, queue(AllgatherOptions)))
        part = torch.empty(600)[::2]
        works.append(backend._reduce_scatter_base(part, full, queue(dist.ReduceScatterOptions)))
        for work in works:
            work.wait()
        assert bool((x == NUM_RANKS**num).all())
        assert bool((full == NUM_RANKS**num).all())
        assert bool((part == NUM_RANKS ** (num + 1)).all())

    ranks(call)


def freed() -> Tensor:
    x = torch.ones(4)
    x.untyped_storage().resize_(0)
    return x


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.qint8)


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(2)])


REFUSED: list[tuple[str, Callable[[], Tensor], str]] = [
    ("meta", lambda: torch.ones(4, device="meta"), "on cpu"),
    ("csr", lambda: torch.eye(2).to_sparse_csr(), "dense"),
    ("quantized", quantized, "plain elements"),
    ("nested", nested, "plain elements"),
    ("zero tensor", lambda: torch._efficientzerotensor(4), "plain elements"),
    ("freed", freed, "storage was freed"),
]
SHARED: list[tuple[str, Callable[[], Tensor], str]] = [
    ("expanded", lambda: torch.ones(1).expand(4), "share memory"),
    ("overlapping", lambda: torch.ones(3).as_strided((2, 2), (1, 1)), "share memory"),
]


@pytest.mark.parametrize(
    ("make", "words"), [case[1:] for case in REFUSED + SHARED], ids=[c[0] for c in REFUSED + SHARED]
)
def test_refused_before_anybody_is_harmed(
    ranks: ThreadRanks, make: Callable[[], Tensor], words: str
) -> None:
    def call(backend: Any, rank: int) -> None:
        plain = torch.ones(4)
        fulls = [torch.ones(4) for _ in range(NUM_RANKS)]
        for function in (
            lambda: backend.allreduce([make()]),
            lambda: backend.recv([make()], 0, 0),
            lambda: backend.allgather([[make() for _ in range(NUM_RANKS)]], [plain]),
            lambda: backend.reduce_scatter([make()], [fulls]),
            lambda: backend.alltoall([make() for _ in range(NUM_RANKS)], fulls),
        ):
            with pytest.raises(ValueError, match=words):
                function()
        backend.barrier().wait()

    ranks(call)


@pytest.mark.parametrize(("make", "words"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_refused_as_an_input(ranks: ThreadRanks, make: Callable[[], Tensor], words: str) -> None:
    backend = ranks.backends[0]
    for function in (
        lambda: backend._allgather_base(torch.empty(4 * NUM_RANKS), make()),
        lambda: backend.broadcast([make()]),
        lambda: backend.send([make()], 1, 0),
    ):
        with pytest.raises(ValueError, match=words):
            function()


def test_an_expanded_tensor_may_be_read(ranks: ThreadRanks) -> None:
    def call(backend: Any, rank: int) -> None:
        x = torch.tensor([float(rank)]).expand(4)
        full = torch.empty(4 * NUM_RANKS)
        backend._allgather_base(full, x).wait()
        assert torch.equal(full, torch.arange(float(NUM_RANKS)).repeat_interleave(4))
        got = x if rank == 0 else torch.empty(4)
        backend.broadcast([got]).wait()
        assert got.tolist() == [0.0] * 4

    ranks(call)


def test_scalars_and_empty_tensors(ranks: ThreadRanks) -> None:
    def call(backend: Any, rank: int) -> None:
        x = torch.tensor(float(rank))  # 0-d
        full = torch.empty(NUM_RANKS)
        backend._allgather_base(full, x).wait()
        assert full.tolist() == [0.0, 1.0, 2.0]
        backend.allreduce([x]).wait()
        assert x.item() == 3.0
        scalars = [torch.empty(()) for _ in range(NUM_RANKS)]
        backend.allgather([scalars], [torch.tensor(rank + 0.5)]).wait()
        assert [s.item() for s in scalars] == [0.5, 1.5, 2.5]
        empty = torch.empty(0, 5)
        backend.allreduce([empty]).wait()
        backend.alltoall_base(torch.empty(0, 5), empty, [0] * NUM_RANKS, [0] * NUM_RANKS).wait()
        backend._allgather_base(torch.empty(0, 5), empty).wait()

    ranks(call)


def test_tensors_of_autograd(ranks: ThreadRanks) -> None:
    """Collectives write below autograd: leaves, views of them and conjugates alike."""

    def call(backend: Any, rank: int) -> None:
        leaf = torch.ones(4, 2, requires_grad=True)
        backend.allreduce([leaf]).wait()
        backend.allreduce([leaf.t()]).wait()
        assert leaf.detach().unique().tolist() == [9.0]
        z = torch.complex(torch.ones(3), torch.full((3,), float(rank)))
        backend.allreduce([z.conj()]).wait()
        assert z.tolist() == [complex(3, 3)] * 3
        negative = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
        assert negative.is_neg()
        backend.allreduce([negative]).wait()
        assert negative.tolist() == [-3.0] * 3

    ranks(call)


# ---- sparse sums


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.booleans())
def test_sparse_sums_are_the_dense_ones(
    ranks: ThreadRanks, data: st.DataObject, dtype: torch.dtype, queued: bool
) -> None:
    sizes, num_dense = (6, 4), data.draw(st.integers(0, 1))
    xs = []
    for r in range(NUM_RANKS):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)) + 100 * r)
        num = data.draw(st.integers(0, 9))  # with repeated indices
        indices = torch.randint(0, 4, (len(sizes) - num_dense, num), generator=generator)
        values = torch.randn(num, *sizes[len(sizes) - num_dense :], generator=generator) * 100
        xs.append(torch.sparse_coo_tensor(indices, values.to(dtype), sizes))
    expected = reference.reduce([x.to_dense() for x in xs])
    options = dist.AllreduceOptions()
    options.asyncOp = queued

    def call(backend: Any, rank: int) -> Tensor:
        x = xs[rank].clone()
        backend.allreduce([x], options).wait()
        return x

    for got in ranks(call):
        assert got.is_sparse
        assert got.is_coalesced()
        assert torch.equal(got.to_dense(), expected)


def test_sparse_sums_of_unequal_shapes_are_errors_on_every_rank() -> None:
    ranks = ThreadRanks(NUM_RANKS)

    def call(backend: Any, rank: int) -> None:
        backend.allreduce([torch.eye(4 if rank == 1 else 5).to_sparse()]).wait()

    for error in ranks.errors(call):
        assert isinstance(error, ValueError)
        assert "[4, 4] of which 2 are sparse on rank 1" in str(error)

    def more_dimensions(backend: Any, rank: int) -> None:
        backend.allreduce([torch.ones((2,) * (rank + 1)).to_sparse()]).wait()

    for error in ranks.errors(more_dimensions):
        assert isinstance(error, errors.CollectiveMismatch)
    ranks.close()
