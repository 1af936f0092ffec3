"""Fused collectives against their definition: cast, then gather; tree over ranks, then scale."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ThreadRanks
from test_backend_bits import assert_bits, draw
from torch import Tensor

from primitives import canonical, reference
from primitives.errors import CollectiveMismatch

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SIZES = st.one_of(st.integers(0, 40), st.sampled_from([1023, 1025, 33_001, 100_003]))
SHAPES = st.lists(st.tuples(SIZES, st.integers(1, 3)), min_size=1, max_size=7)


# The host of each rank, and how it writes.
@pytest.fixture(
    scope="module", params=["a", "aa", "aaa", "aaa stream", "aaaa", "aaaa stream", "ab", "abba"]
)
def ranks(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    hosts, _, staging = request.param.partition(" ")
    group = ThreadRanks(len(hosts), hosts=hosts, staging=staging)
    yield group
    group.close()


def cut(full: Tensor, n: int, numels: list[int]) -> list[Tensor]:
    """Every rank's shard of a full tensor: by numels, or FSDP2's chunks of dimension 0."""
    if numels:
        return list(full.flatten().split(numels))
    chunks = list(torch.chunk(full, n)) if full.shape[0] else []
    return [chunks[r] if r < len(chunks) else full[:0] for r in range(n)]


def place(backend: Any, x: Tensor, symmetric: bool) -> Tensor:
    """A copy, in symmetric memory of this rank alone or in ordinary memory."""
    if not symmetric:
        return x.clone()
    memory = backend.allocate_tensor(x.numel(), dtype=x.dtype, device=torch.device("cpu"))
    return memory.view(x.shape).copy_(x)


@st.composite
def lists(draw_value: Any, n: int) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Shapes, and how they are cut: [] as FSDP2 does, or counts for each rank."""
    shapes = draw_value(SHAPES)
    if draw_value(st.booleans()):
        return shapes, []
    numels = []
    for rows, width in shapes:
        points = [draw_value(st.integers(0, rows * width)) for _ in range(n - 1)]
        bounds = [0, *sorted(points), rows * width]
        numels.append([b - a for a, b in pairwise(bounds)])
    return shapes, numels


# Which ranks' full tensors are symmetric; 15: all of them.
MASKS = st.sampled_from([0, 15, 15, 5])


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([*FLOATS, torch.int64]), st.sampled_from(FLOATS), MASKS)
def test_all_gather(
    ranks: ThreadRanks, data: st.DataObject, source: Any, target: Any, mask: int
) -> None:
    n = ranks.world_size
    target = source if source == torch.int64 else target
    shapes, numels = data.draw(lists(n))
    wholes = [draw(shape, source, i) for i, shape in enumerate(shapes)]
    shards = [cut(x, n, numels[i] if numels else []) for i, x in enumerate(wholes)]
    queued, in_place = data.draw(st.booleans()), data.draw(st.booleans()) and source == target
    flat = [numel for of_tensor in numels for numel in of_tensor]

    def call(backend: Any, rank: int) -> tuple[list[Tensor], int]:
        symmetric = bool(mask >> rank & 1)
        fulls = [place(backend, torch.zeros(s, dtype=target), symmetric) for s in shapes]
        mine = [of_tensor[rank].clone() for of_tensor in shards]
        if in_place:
            for i, full in enumerate(fulls):
                own = cut(full, n, numels[i] if numels else [])[rank]
                mine[i] = own.copy_(mine[i].view(own.shape))
        before = backend.num_zero_copy
        backend.all_gather_many(mine, fulls, flat, queued).wait()
        return fulls, backend.num_zero_copy - before

    for fulls, num_zero_copy in ranks(call):
        for got, want in zip(fulls, wholes, strict=True):
            assert_bits(got, want.to(target))
        # No bytes lie in every heap; over several hosts the tensors themselves are not shared.
        if ranks.num_hosts == 1 and any(x.numel() > 0 for x in wholes):
            assert num_zero_copy == (mask == 15 and n > 1)


@settings(max_examples=30, deadline=None)
@given(
    st.data(),
    st.sampled_from(FLOATS),
    MASKS,
    st.sampled_from([1.0, 0.25, 1 / 3, -7e-3]),
    st.booleans(),
    st.booleans(),
)
def test_reduce_scatter(
    ranks: ThreadRanks,
    data: st.DataObject,
    dtype: Any,
    mask: int,
    factor: float,
    accumulate: bool,
    queued: bool,
) -> None:
    n = ranks.world_size
    shapes, numels = data.draw(lists(n))
    seed = data.draw(st.integers(0, 99))
    grads = [
        [draw(shape, dtype, seed + 9 * i + r) for i, shape in enumerate(shapes)] for r in range(n)
    ]
    sums = [
        reference.tree([grads[r][i].float() for r in range(n)], torch.add)
        * torch.tensor(factor, dtype=torch.float32)
        for i in range(len(shapes))
    ]
    held = [draw(shape, torch.float32, 1000 + i) for i, shape in enumerate(shapes)]
    totals = [held[i] + x if accumulate else x for i, x in enumerate(sums)]
    flat = [numel for of_tensor in numels for numel in of_tensor]

    def parts(tensors: list[Tensor], rank: int) -> list[Tensor]:
        return [cut(x, n, numels[i] if numels else [])[rank] for i, x in enumerate(tensors)]

    def call(backend: Any, rank: int) -> tuple[list[Tensor], Tensor]:
        fulls = [place(backend, x, bool(mask >> rank & 1)) for x in grads[rank]]
        shards = [x.clone() for x in parts(held, rank)]
        squares = torch.full([len(shapes)], -1.0)
        work = backend.reduce_scatter_many(fulls, shards, flat, factor, accumulate, squares, queued)
        work.wait()
        for full in fulls:
            full.zero_()  # allowed once the call has returned
        return shards, squares

    for rank, (shards, squares) in enumerate(ranks(call)):
        for got, want in zip(shards, parts(totals, rank), strict=True):
            assert_bits(got, want)
        for got, shard in zip(squares, shards, strict=True):
            assert_bits(got, canonical.sum_of_squares(shard.flatten()))


def test_many_small_tensors_are_one_call(ranks: ThreadRanks) -> None:
    shapes = [(3, i % 5) for i in range(3000)]

    def call(backend: Any, rank: int) -> list[Tensor]:
        wholes = [torch.full(shape, float(i)) for i, shape in enumerate(shapes)]
        shards = [cut(x, ranks.world_size, [])[rank].clone() for x in wholes]
        fulls = [torch.zeros(shape) for shape in shapes]
        backend.all_gather_many(shards, fulls, [], False).wait()
        return fulls

    for fulls in ranks(call):
        for i, full in enumerate(fulls):
            assert torch.equal(full, torch.full(shapes[i], float(i)))


@pytest.mark.parametrize("hosts", ["aa", "ab"])
def test_lists_that_differ_between_ranks_are_a_mismatch(hosts: str) -> None:
    changes: list[dict[str, Any]] = [
        {"shape": (9, 2)},
        {"num": 3},
        {"numels": [10, 10, 12, 8]},
        {"factor": 0.5},
        {"accumulate": True},
        {"dtype": torch.bfloat16},
    ]
    for change in changes:
        ranks = ThreadRanks(2, hosts=hosts)

        def call(backend: Any, rank: int, change: dict[str, Any] = change) -> None:
            of = {"num": 2, "shape": (10, 2), "numels": [], "dtype": torch.float32}
            of |= {"factor": 1.0, "accumulate": False} | (change if rank == 1 else {})
            fulls = [torch.ones(of["shape"], dtype=of["dtype"]) for _ in range(of["num"])]
            own = of["numels"][rank::2] or [of["shape"][0] // 2 * 2] * of["num"]
            if of["shape"] == (9, 2):
                own = [8, 8]
            shards = [torch.zeros(numel) for numel in own]
            backend.reduce_scatter_many(
                fulls, shards, of["numels"], of["factor"], of["accumulate"], None, False
            ).wait()

        for error in ranks.errors(call):
            assert isinstance(error, CollectiveMismatch), (change, error)
            assert "fused reduce_scatter" in str(error)
        ranks.close()


def test_what_does_not_fit_is_refused(ranks: ThreadRanks) -> None:
    n, x = ranks.world_size, torch.zeros(12)
    wrong: list[tuple[list[Tensor], list[Tensor], list[int], str]] = [
        ([x], [], [], "expected one shard for each full tensor, got 1 shards and 0"),
        ([], [], [], "expected a shard, got none"),
        ([torch.zeros(5)], [torch.zeros(24)], [], r"shards\[0\]: expected"),
        ([x.view(4, 3).t()], [torch.zeros(12 * n)], [], r"shards\[0\]: expected a contiguous"),
        ([x, x.double()], [torch.zeros(12 * n)] * 2, [], r"shards\[1\]: expected dtype float32"),
        ([x.double()], [torch.zeros(12 * n)], [], "expected equal dtypes, or float32"),
        ([x], [torch.zeros(12 * n)], [5], "expected"),
        ([x], [torch.zeros(12 * n + 1)], [12] * n, "expected counts that sum to"),
        ([x, x], [torch.zeros(12 * n)] * 2, [], "overlap"),
    ]
    backend = ranks.backends[0]
    for shards, fulls, numels, message in wrong:
        with pytest.raises(ValueError, match=message):
            backend.all_gather_many(shards, fulls, numels, False)
    if n > 1:
        full = torch.zeros(12 * n)
        with pytest.raises(ValueError, match="overlap"):
            backend.all_gather_many([full[6:18]], [full], [], False)
    full = torch.zeros(12 * n)
    with pytest.raises(ValueError, match=r"shards\[0\]: expected float32, got float16"):
        backend.reduce_scatter_many([full], [x.half()], [], 1.0, False, None, False)
