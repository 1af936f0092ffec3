"""Every collective on random cases against primitives.reference, bit for bit.

``PRIMITIVES_PROPERTY_CASES`` says how many cases to play in all; ``make properties`` plays 10,000.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from collective_cases import (
    LAYOUTS,
    MOVED,
    OPS,
    REDUCED,
    Case,
    assert_bits,
    cases,
    exact_values,
    laid,
    values,
)
from collective_groups import Groups
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import ThreadRanks
from torch import Tensor

from primitives import env, reference
from primitives.errors import CollectiveError

NUM_CASES = int(env.PROPERTY_CASES.get())


def share(percent: int, **strategies: Any) -> Callable[[Any], Any]:
    """A property test that plays this share of all cases."""

    def decorate(test: Any) -> Any:
        limits = settings(
            max_examples=max(10, NUM_CASES * percent // 100),
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        return limits(given(**strategies)(test))

    return decorate


@pytest.fixture(scope="module")
def groups(request: pytest.FixtureRequest) -> Iterator[Groups]:
    made = Groups()
    yield made
    made.close()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        made.report()


def options(kind: Any, case: Case, **fields: Any) -> Any:
    made = kind()
    made.asyncOp = case.queued
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def draw_all(case: Case) -> list[Tensor]:
    """Rank r's input of ``numels[r]`` elements."""
    return [values(n, case.dtype, case.seed + r, case.source) for r, n in enumerate(case.numels)]


def draw_matrix(case: Case) -> list[list[Tensor]]:
    """``[s][r]``: what rank s has for rank r, of ``numels[r]`` elements."""
    return [
        [
            values(n, case.dtype, case.seed + 9 * s + r, case.source)
            for r, n in enumerate(case.numels)
        ]
        for s in range(case.world_size)
    ]


def empty(x: Tensor, how: str) -> Tensor:
    """An output for ``x`` that holds other values."""
    return laid(values(x.numel(), x.dtype, 77), how)


def whole(parts: list[Tensor], how: str) -> Tensor:
    """The parts one behind the other: plainly when they are ``expanded``, as parts differ."""
    return laid(torch.cat(parts), "plain" if how == "expanded" else how)


@share(22, case=cases(["one", "coalesced"], reduces=True))
def test_all_reduce(groups: Groups, case: Case) -> None:
    xs = draw_all(case)
    others = [values(5, case.dtype, case.seed + 50 + r) for r in range(case.world_size)]

    def call(backend: Any, rank: int) -> tuple[Tensor, Tensor]:
        # An input is also the output here, so it cannot be expanded or a lazy negation.
        x, other = laid(xs[rank], case.target), others[rank].clone()
        if case.form == "coalesced":
            made = options(dist.AllreduceCoalescedOptions, case, reduceOp=OPS[case.op])
            backend.allreduce_coalesced([x, other], made).wait()
        else:
            made = options(dist.AllreduceOptions, case, reduceOp=OPS[case.op])
            works = [backend.allreduce([y], made) for y in (x, other)]
            for work in reversed(works):
                work.wait()
        return x, other

    for x, other in groups.play("all_reduce", case, call):
        assert_bits(x, reference.reduce(xs, case.op))
        assert_bits(other, reference.reduce(others, case.op))


@share(18, case=cases(["tensor", "list", "coalesced", "in place"], reduces=True))
def test_reduce_scatter(groups: Groups, case: Case) -> None:
    xs = draw_matrix(case)
    expected = reference.reduce_scatter(xs, case.op)

    def call(backend: Any, rank: int) -> Tensor:
        made = options(dist.ReduceScatterOptions, case, reduceOp=OPS[case.op])
        out = empty(expected[rank], case.target)
        if case.form == "list":
            backend.reduce_scatter([out], [[laid(x, case.source) for x in xs[rank]]], made).wait()
            return out
        full = whole(xs[rank], case.source)
        if case.form == "coalesced":
            backend._start_coalescing()
            backend._reduce_scatter_base(torch.empty_like(out), full, made)
            backend._reduce_scatter_base(out, full, made)
            backend._end_coalescing().wait()
            return out
        if case.form == "in place":
            full = torch.cat(xs[rank])
            out = full[rank * case.numel : (rank + 1) * case.numel]
        backend._reduce_scatter_base(out, full, made).wait()
        return out

    for got, want in zip(groups.play("reduce_scatter", case, call), expected, strict=True):
        assert_bits(got, want)


@share(20, case=cases(["tensor", "list", "coalesced", "in place", "overlap"], reduces=False))
def test_all_gather(groups: Groups, case: Case) -> None:
    xs = draw_all(case)

    def call(backend: Any, rank: int) -> list[Tensor]:
        made = options(c10d.AllgatherOptions, case)
        x = laid(xs[rank], case.source)
        if case.form == "list":
            outs = [empty(y, case.target) for y in xs]
            backend.allgather([outs], [x], made).wait()
            return outs
        full = empty(torch.cat(xs), case.target)
        if case.form == "coalesced":
            backend._start_coalescing()
            backend._allgather_base(torch.empty_like(full), x, made)
            backend._allgather_base(full, x, made)
            backend._end_coalescing().wait()
        else:
            if case.form in ("in place", "overlap"):
                full = full.clone(memory_format=torch.contiguous_format).reshape(-1)
                # "overlap": the input lies at another place of the output than its own
                at = rank * case.numel if case.form == "in place" else 0
                x = full[at : at + case.numel]
                x.copy_(xs[rank])
            backend._allgather_base(full, x, made).wait()
        return list(full.reshape(-1).split(case.numel)) if case.numel else []

    for got in groups.play("all_gather", case, call):
        for y, want in zip(got, xs, strict=case.numel > 0):
            assert_bits(y, want)


@share(18, case=cases(["even", "splits", "list", "in place"], reduces=False))
def test_all_to_all(groups: Groups, case: Case) -> None:
    n = case.world_size
    # Rank s sends numels[(r + s) % n] elements to rank r: uneven for both.
    xs = [
        [
            values(case.numels[(r + s) % n], case.dtype, case.seed + 9 * s + r, case.source)
            for r in range(n)
        ]
        for s in range(n)
    ]
    expected = reference.all_to_all(xs)

    def call(backend: Any, rank: int) -> Tensor:
        made = options(c10d.AllToAllOptions, case)
        if case.form == "list":
            outs = [empty(x, case.target) for x in expected[rank]]
            backend.alltoall(outs, [laid(x, case.source) for x in xs[rank]], made).wait()
            return torch.cat([out.reshape(-1) for out in outs])
        splits = case.form == "splits"
        # Splits count rows, here elements: the layouts that keep one dimension.
        flat = {"transposed": "every second"} if splits else {}
        full = whole(xs[rank], flat.get(case.source, case.source))
        want = torch.cat(expected[rank])
        out = full if case.form == "in place" else empty(want, flat.get(case.target, case.target))
        if splits and out.dim() == 1 and full.dim() == 1:
            received, sent = ([len(x) for x in parts] for parts in (expected[rank], xs[rank]))
        else:
            received, sent = [], []
        backend.alltoall_base(out, full, received, sent, made).wait()
        return out

    if case.form == "in place" and case.source == "negated":
        return  # a lazy negation cannot be written to
    for got, want in zip(groups.play("all_to_all", case, call), expected, strict=True):
        assert_bits(got, torch.cat(want))


@share(5, case=cases(["one"], reduces=False))
def test_broadcast(groups: Groups, case: Case) -> None:
    xs = draw_all(case)

    def call(backend: Any, rank: int) -> Tensor:
        x = laid(xs[rank], case.target)
        backend.broadcast([x], options(dist.BroadcastOptions, case, rootRank=case.root)).wait()
        return x

    for got in groups.play("broadcast", case, call):
        assert_bits(got, xs[case.root])


@share(7, case=cases(["one"], reduces=True))
def test_reduce(groups: Groups, case: Case) -> None:
    xs = draw_all(case)

    def call(backend: Any, rank: int) -> Tensor:
        x = laid(xs[rank], case.target)
        made = options(dist.ReduceOptions, case, rootRank=case.root, reduceOp=OPS[case.op])
        backend.reduce([x], made).wait()
        return x

    for rank, got in enumerate(groups.play("reduce", case, call)):
        assert_bits(got, reference.reduce(xs, case.op) if rank == case.root else xs[rank])


@share(5, case=cases(["apart", "in place"], reduces=False))
def test_gather(groups: Groups, case: Case) -> None:
    xs = draw_all(case)

    def call(backend: Any, rank: int) -> list[Tensor]:
        x = laid(xs[rank], case.source)
        outs = [empty(y, case.target) for y in xs] if rank == case.root else []
        if case.form == "in place" and outs:
            outs[rank] = x = laid(xs[rank], case.target)
        made = options(dist.GatherOptions, case, rootRank=case.root)
        backend.gather([outs] if outs else [], [x], made).wait()
        return outs

    for outs in groups.play("gather", case, call):
        for got, want in zip(outs, xs, strict=bool(outs)):
            assert_bits(got, want)


@share(5, case=cases(["apart", "in place"], reduces=False))
def test_scatter(groups: Groups, case: Case) -> None:
    xs = draw_all(case)

    def call(backend: Any, rank: int) -> Tensor:
        out = empty(xs[rank], case.target)
        parts = [laid(x, case.source) for x in xs] if rank == case.root else []
        if case.form == "in place" and parts:
            parts[rank] = out = laid(xs[rank], case.target)
        made = options(dist.ScatterOptions, case, rootRank=case.root)
        backend.scatter([out], [parts] if parts else [], made).wait()
        return out

    for got, want in zip(groups.play("scatter", case, call), xs, strict=True):
        assert_bits(got, want)


@share(2, case=cases(["one"], reduces=False))
def test_what_has_no_meaning_is_refused_and_the_group_goes_on(groups: Groups, case: Case) -> None:
    """A reduction is right, or a ValueError on every rank before anything is sent."""
    pairs = [(case.dtype, op) for op in OPS if (case.dtype, op) not in REDUCED]
    for dtype, op in pairs:
        xs = [values(min(n, 70), dtype, case.seed + r) for r, n in enumerate(case.numels)]

        def call(
            backend: Any, rank: int, xs: list[Tensor] = xs, op: str = op
        ) -> Tensor | ValueError:
            x = xs[rank].clone()
            try:
                made = options(dist.AllreduceOptions, case, reduceOp=OPS[op])
                backend.allreduce([x], made).wait()
            except ValueError as error:
                return error
            return x

        results = groups.play("refused", case, call)
        refused = [isinstance(result, ValueError) for result in results]
        assert all(refused) or not any(refused), results
        for rank, result in enumerate(results):
            if isinstance(result, ValueError):
                assert op in str(result), result
            else:
                assert_bits(result, reference.all_reduce(xs, op)[rank])


@share(4, case=cases(["one"], reduces=True))
def test_exact_sums_do_not_depend_on_the_order(groups: Groups, case: Case) -> None:
    """A definition that knows of no tree: small integers, summed as Python would."""
    if case.dtype.is_complex or case.dtype == torch.bool:
        return
    xs = [exact_values(n, case.dtype, case.seed + r) for r, n in enumerate(case.numels)]
    want = torch.stack([x.double() for x in xs]).sum(0).to(case.dtype)

    def call(backend: Any, rank: int) -> Tensor:
        x = laid(xs[rank], case.target)
        backend.allreduce([x], options(dist.AllreduceOptions, case)).wait()
        return x

    for got in groups.play("exact sums", case, call):
        assert_bits(got, want)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["sum", "avg", "max"]),
    st.integers(2, 8),
    st.integers(1, 400_000),
    st.lists(st.integers(0, 400_000), max_size=6),
    st.integers(0, 999),
)
def test_bits_do_not_depend_on_message_size(
    groups: Groups, op: str, world_size: int, numel: int, cuts: list[int], seed: int
) -> None:
    """One message and the same numbers in pieces: other chunks, other algorithms, the same bits."""
    xs = [values(numel, torch.float32, seed + r) for r in range(world_size)]
    cuts = sorted({0, numel, *(cut % numel for cut in cuts)})

    def call(backend: Any, rank: int) -> tuple[Tensor, Tensor]:
        once, pieces = xs[rank].clone(), xs[rank].clone()
        made = dist.AllreduceOptions()
        made.reduceOp = OPS[op]
        backend.allreduce([once], made).wait()
        for begin, end in itertools.pairwise(cuts):
            backend.allreduce([pieces[begin:end]], made).wait()
        return once, pieces

    for once, pieces in groups.of(world_size)(call):
        assert_bits(once, pieces)


@pytest.mark.parametrize("queued", [False, True])
def test_an_expanded_output_is_refused(queued: bool) -> None:
    """Several elements in one place cannot hold different results."""
    group = ThreadRanks(2)

    def call(backend: Any, rank: int) -> None:
        made = dist.AllreduceOptions()
        made.asyncOp = queued
        backend.allreduce([torch.ones(1).expand(4)], made).wait()

    errors = group.errors(call)
    assert all(isinstance(error, ValueError) for error in errors), errors
    assert all("strides [0]" in str(error) for error in errors), errors
    group.close()


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_the_comparison_sees_every_flipped_bit(how: str, dtype: torch.dtype) -> None:
    """The check itself: any single bit in any layout and type (but of a NaN, all of which count as
    one) makes it fail."""
    x = torch.arange(1, 8).to(torch.uint8).repeat_interleave(dtype.itemsize)
    x = torch.ones(7, dtype=torch.bool) if dtype == torch.bool else x.view(dtype)
    assert_bits(laid(x, how), x)
    for bit in range(1 if dtype == torch.bool else 8 * dtype.itemsize):
        wrong = x.clone()
        memory = wrong.view(torch.uint8)
        memory[dtype.itemsize * 3 + bit // 8] ^= 1 << bit % 8
        with pytest.raises(AssertionError, match="differ"):
            assert_bits(laid(wrong, how), x)


def test_an_unknown_staging_is_refused() -> None:
    with pytest.raises(CollectiveError, match="expected auto, cache or stream, got 'fast'"):
        ThreadRanks(2, staging="fast")
