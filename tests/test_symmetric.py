"""Symmetric memory: the same bits as staging on every mix of memories; room, reuse and lifetime."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ThreadRanks, leftovers, small_tmpfs
from test_backend_bits import OPS, assert_bits, draw, options
from torch import Tensor

from primitives import reference
from primitives.errors import CollectiveError, CollectiveMismatch

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
# Below and above where symmetric memory pays (32 KiB), odd, and with whole and broken slices.
NUMELS = st.sampled_from([1, 1000, 4099, 16_384, 16_387, 70_001, 300_000])


@pytest.fixture(scope="module", params=["2 auto", "3 stream", "4 auto", "4 stream"])
def ranks(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    world_size, staging = request.param.split()
    group = ThreadRanks(int(world_size), staging=staging)
    yield group
    group.close()


class Memory:
    """Tensors of one rank, symmetric or not, at odd places."""

    def __init__(self, backend: Any, symmetric: bool, skew: int) -> None:
        self.backend, self.symmetric, self.skew = backend, symmetric, skew

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        if not self.symmetric:
            return torch.empty(numel, dtype=dtype)
        whole = self.backend.allocate_tensor(numel + self.skew, dtype=dtype, device=CPU)
        return whole[self.skew :]

    def copy(self, x: Tensor) -> Tensor:
        return self.empty(x.numel(), x.dtype).copy_(x)


# Which ranks' buffers are symmetric; None: all of them.
MASKS = st.one_of(st.none(), st.none(), st.integers(0, 14))


def memories(mask: int | None, backend: Any, rank: int, skew: int) -> Memory:
    return Memory(backend, mask is None or bool(mask >> rank & 1), skew)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DTYPES), NUMELS, MASKS, MASKS, st.integers(0, 3), st.booleans())
def test_all_gather(
    ranks: ThreadRanks,
    dtype: Any,
    numel: int,
    ins: int | None,
    outs: int | None,
    skew: int,
    lists: bool,
) -> None:
    n = ranks.world_size
    xs = [draw((numel + (r if lists else 0),), dtype, r) for r in range(n)]

    def call(backend: Any, rank: int) -> tuple[Tensor, int]:
        x = memories(ins, backend, rank, skew).copy(xs[rank])
        out = memories(outs, backend, rank, skew).empty(sum(map(len, xs)), dtype)
        before = backend.num_zero_copy
        if lists:
            backend.allgather([list(out.split([len(x) for x in xs]))], [x]).wait()
        else:
            backend._allgather_base(out, x).wait()
        x.zero_()  # allowed once the call has returned
        return out, backend.num_zero_copy - before

    for got, num_zero_copy in ranks(call):
        assert_bits(got, torch.cat(xs))
        full = 2**n - 1
        whole = any(mask is None or mask & full == full for mask in (ins, outs))
        assert num_zero_copy == (whole and numel * dtype.itemsize >= 32 << 10)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(DTYPES),
    NUMELS,
    MASKS,
    st.integers(0, 3),
    st.sampled_from(["sum", "max"]),
    st.booleans(),
)
def test_reductions(
    ranks: ThreadRanks, dtype: Any, numel: int, mask: int | None, skew: int, op: str, queued: bool
) -> None:
    n = ranks.world_size
    xs = [draw((n * numel,), dtype, r) for r in range(n)]
    summed = reference.reduce(xs, op)

    def call(backend: Any, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        memory = memories(mask, backend, rank, skew)
        reduced, source, in_place = (memory.copy(xs[rank]) for _ in range(3))
        out = torch.empty(numel, dtype=dtype)
        how = options(dist.AllreduceOptions, reduceOp=OPS[op], asyncOp=queued)
        works = [backend.allreduce([reduced], how)]
        how = options(dist.ReduceScatterOptions, reduceOp=OPS[op], asyncOp=queued)
        works.append(backend._reduce_scatter_base(out, source, how))
        own = in_place[rank * numel : (rank + 1) * numel]
        works.append(backend._reduce_scatter_base(own, in_place, how))
        for work in works:
            work.wait()
        source.zero_()
        return reduced, out, own

    for rank, (reduced, out, own) in enumerate(ranks(call)):
        assert_bits(reduced, summed)
        assert_bits(out, summed[rank * numel : (rank + 1) * numel])
        assert_bits(own, out)


@settings(max_examples=30, deadline=None)
@given(st.data(), MASKS, st.integers(0, 3), st.sampled_from(DTYPES))
def test_all_to_all_and_broadcast(
    ranks: ThreadRanks, data: st.DataObject, mask: int | None, skew: int, dtype: Any
) -> None:
    n = ranks.world_size
    sizes = [
        [data.draw(st.sampled_from([0, 1, 7, 20_001, 40_000])) for _ in range(n)] for _ in range(n)
    ]
    xs = [[draw((sizes[s][r],), dtype, 9 * s + r) for r in range(n)] for s in range(n)]
    root = data.draw(st.integers(0, n - 1))

    def call(backend: Any, rank: int) -> tuple[Tensor, Tensor]:
        memory = memories(mask, backend, rank, skew)
        x = memory.copy(torch.cat(xs[rank]))
        received = [sizes[s][rank] for s in range(n)]
        out = torch.empty(sum(received), dtype=dtype)
        backend.alltoall_base(out, x, received, sizes[rank]).wait()
        sent = memory.copy(draw((100_003,), dtype, rank))
        backend.broadcast([sent], options(dist.BroadcastOptions, rootRank=root)).wait()
        x.zero_()
        return out, sent

    for rank, (out, sent) in enumerate(ranks(call)):
        assert_bits(out, torch.cat([xs[s][rank] for s in range(n)]))
        assert_bits(sent, draw((100_003,), dtype, root))


def test_a_mismatch_in_symmetric_memory_is_named() -> None:
    ranks = ThreadRanks(3)

    def call(backend: Any, rank: int) -> None:
        x = backend.empty([20_000], torch.float32)
        backend.allreduce([x[: 20_000 - rank // 2]]).wait()

    for error in ranks.errors(call):
        assert isinstance(error, CollectiveMismatch), error
        assert "rank 0, 1: all_reduce(sum, float32, numel 20000)" in str(error)
        assert "rank 2: all_reduce(sum, float32, numel 19999)" in str(error)
    ranks.close()


def test_empty_is_a_collective_of_equal_sizes() -> None:
    ranks = ThreadRanks(2)
    for error in ranks.errors(lambda backend, rank: backend.empty([4, rank], torch.int8)):
        assert isinstance(error, CollectiveMismatch), error
        assert "empty(int8, numel 0)" in str(error)
        assert "empty(int8, numel 4)" in str(error)
    ranks.close()


def test_freed_memory_is_used_again() -> None:
    ranks = ThreadRanks(2)

    def call(backend: Any, rank: int) -> None:
        first, second = (backend.empty([1000], torch.float32) for _ in range(2))
        assert second.data_ptr() - first.data_ptr() == 4032  # whole cache lines
        place = first.data_ptr()
        view = first[10:]
        del first
        third = backend.empty([1000], torch.float32)
        assert third.data_ptr() not in (place, second.data_ptr())  # the view still holds it
        del view
        assert backend.empty([1008], torch.float32).data_ptr() == place
        del second, third  # neighbours merge
        assert backend.empty([3000], torch.float32).data_ptr() == place

    ranks(call)
    ranks.close()


def test_memory_outlives_its_group() -> None:
    ranks = ThreadRanks(2)
    tensors = ranks(lambda backend, rank: backend.empty([5000], torch.int32).fill_(rank))
    ranks.close()
    gc.collect()
    assert [int(tensor.sum()) for tensor in tensors] == [0, 5000]
    assert leftovers() == []


def test_a_closed_group_hands_out_nothing() -> None:
    ranks = ThreadRanks(2)
    backends = list(ranks.backends)
    ranks.close()
    with pytest.raises(CollectiveError, match="is closed"):
        backends[0].allocate_tensor(8, dtype=torch.float32, device=CPU)


def test_a_group_of_one_has_symmetric_memory() -> None:
    ranks = ThreadRanks(1)

    def call(backend: Any, rank: int) -> Tensor:
        x = backend.empty([20_000], torch.float32).fill_(3)
        backend.allreduce([x]).wait()
        return x

    assert ranks(call)[0].unique().tolist() == [3]
    ranks.close()


def test_full_shared_memory_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, "24m") as folder:
        ranks = ThreadRanks(2, shm_dir=folder)
        for error in ranks.errors(lambda backend, rank: backend.empty([2**25], torch.uint8)):
            assert isinstance(error, CollectiveError), error
            assert "has no room for 33554432 bytes of symmetric memory" in str(error)
        # The group goes on, and what fits is still handed out.
        for x in ranks(lambda backend, rank: backend.empty([2**20], torch.uint8).fill_(1)):
            assert x.sum() == 2**20
        ranks.close()


def test_tensors_of_the_group_allocator_need_not_match(ranks: ThreadRanks) -> None:
    """What FSDP2 does with set_allocate_memory_from_process_group_for_comm."""
    n, numel = ranks.world_size, 30_000

    def call(backend: Any, rank: int) -> tuple[Tensor, int]:
        assert backend.supports_tensor_alloc(CPU)
        padding = [
            backend.allocate_tensor(64 * (rank + 1), dtype=torch.int8, device=CPU)
            for _ in range(rank)
        ]
        out = backend.allocate_tensor(n * numel, dtype=torch.bfloat16, device=CPU)
        before = backend.num_zero_copy
        own = out[rank * numel : (rank + 1) * numel].fill_(rank)
        backend._allgather_base(out, own).wait()
        assert len(padding) == rank
        return out, backend.num_zero_copy - before

    for out, num_zero_copy in ranks(call):
        assert num_zero_copy == 1
        assert out.view(n, numel)[:, -1].tolist() == list(range(n))
        assert out.view(n, numel)[:, 0].tolist() == list(range(n))
