"""PRIMITIVES_CHECK=1: a bit that flips between two ranks is an error that names them and the bytes;
without it nobody sees it. Checked results are the same bits."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import ThreadRanks

from primitives.env import CHECK
from primitives.errors import CollectiveError
from scenarios.faults.flip import flip_in_segments

Call = Callable[[Any, int, int, torch.Tensor], torch.Tensor]


def with_root(options: Any, root: int) -> Any:
    options.rootRank = root
    return options


def all_gather(b: Any, rank: int, n: int, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(n * x.numel())
    b._allgather_base(out, x).wait()
    return out


def all_reduce(b: Any, rank: int, n: int, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    b.allreduce([x]).wait()
    return x


def reduce_scatter(b: Any, rank: int, n: int, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    b._reduce_scatter_base(out, x.repeat(n)).wait()
    return out


def all_to_all(b: Any, rank: int, n: int, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(n * x.numel())
    b.alltoall_base(out, x.repeat(n), [], []).wait()
    return out


def broadcast(b: Any, rank: int, n: int, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    b.broadcast([x], with_root(dist.BroadcastOptions(), n - 1)).wait()
    return x


def reduce(b: Any, rank: int, n: int, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    b.reduce([x], with_root(dist.ReduceOptions(), 0)).wait()
    return x


def gather(b: Any, rank: int, n: int, x: torch.Tensor) -> torch.Tensor:
    outs = [[torch.empty_like(x) for _ in range(n)]] if rank == 0 else []
    b.gather(outs, [x], with_root(dist.GatherOptions(), 0)).wait()
    return torch.cat(outs[0]) if outs else x


def scatter(b: Any, rank: int, n: int, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    ins = [[x.clone() for _ in range(n)]] if rank == n - 1 else []
    b.scatter([out], ins, with_root(dist.ScatterOptions(), n - 1)).wait()
    return out


def message(b: Any, rank: int, n: int, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    (b.send([x], 0, 3) if rank == n - 1 else b.recv([out], n - 1, 3)).wait()
    return out


CALLS: list[Call] = [
    all_gather, all_reduce, reduce_scatter, all_to_all, broadcast, reduce, gather, scatter, message,
]  # fmt: skip


numbers = itertools.count()


def play_with_a_flip(call: Call, numel: int, bit: int) -> tuple[list[Any], torch.Tensor]:
    """Rank 1 stages its data and waits; a bit of it flips; then rank 0 comes. Results or errors,
    and what went in."""
    ranks = ThreadRanks(2, timeout_s=10)
    # Found nowhere else: an earlier group's memory may still be there.
    x = torch.rand(numel, generator=torch.Generator().manual_seed(next(numbers)))
    results: list[Any] = [None, None]

    def run(rank: int) -> None:
        try:
            results[rank] = call(ranks.backends[rank], rank, 2, x)
        except CollectiveError as error:
            results[rank] = error

    late = threading.Thread(target=run, args=(1,))
    late.start()
    deadline = time.monotonic() + 5
    while flip_in_segments(bytes(x[:16].numpy()), bit) != 1:
        assert time.monotonic() < deadline, "rank 1 staged nothing"
        time.sleep(0.001)
    run(0)
    late.join()
    ranks.close()
    return results, x


@settings(max_examples=40)
@given(st.sampled_from(CALLS), st.integers(16, 40_000), st.integers(0, 7))
def test_a_flipped_bit_is_found(call: Call, numel: int, bit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHECK.name, "1")
        (error, _), _ = play_with_a_flip(call, numel, bit)
    assert type(error) is CollectiveError
    text = str(error)
    assert "read other bytes than rank 1 wrote, in bytes [0, " in text
    assert call.__name__.replace("message", "recv") in text
    assert "rank 0 of group" in text or "on rank 0" in text
    assert "test_checked_mode.py" in text


@pytest.mark.parametrize("call", CALLS)
def test_the_same_flip_is_not_seen_without_it(call: Call) -> None:
    (result, _), right = play_with_a_flip(call, 100, bit=7)
    good = {
        all_gather: right.repeat(2), gather: right.repeat(2), all_to_all: right.repeat(2),
        all_reduce: right + right, reduce: right + right, reduce_scatter: right + right,
    }.get(call, right)  # fmt: skip
    assert result.shape == good.shape
    assert not torch.equal(result, good)


@pytest.fixture(scope="module")
def both_modes() -> Iterator[list[ThreadRanks]]:
    groups = [ThreadRanks(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHECK.name, "1")
        groups.append(ThreadRanks(3))
    yield groups
    for group in groups:
        group.close()


@settings(max_examples=60)
@given(st.sampled_from([c for c in CALLS if c is not message]), st.integers(0, 150_000), st.data())
def test_checked_results_are_the_same_bits(
    both_modes: list[ThreadRanks], call: Call, numel: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 1000))
    values = [torch.randn(numel, generator=torch.Generator().manual_seed(seed + r))
              for r in range(3)]  # fmt: skip
    plain, checked = (g(lambda b, r: call(b, r, 3, values[r])) for g in both_modes)
    for a, b in zip(plain, checked, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_one_rank_turns_it_on_for_all() -> None:
    """A rank that does not ask for digests publishes them for one that does."""
    from datetime import timedelta

    from ranks import run_threads

    from primitives import _C

    store = dist.HashStore()

    def make(rank: int) -> Any:
        return _C.Backend(store, rank, 2, _C.Backend.Options(timedelta(seconds=10)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHECK.name, "1")
        first = threading.Thread(target=lambda: backends.append(make(0)))
        backends: list[Any] = []
        first.start()
        time.sleep(0.2)
        patch.delenv(CHECK.name)
        backends.append(make(1))
        first.join()
    backends.sort(key=lambda b: b.rank())
    x = torch.ones(1000)
    run_threads(2, lambda r: all_gather(backends[r], r, 2, x))
    run_threads(2, lambda r: backends[r].shutdown())
