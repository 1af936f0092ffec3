"""Random programs: collectives and messages on several groups, at once and later, against a model.

Every rank runs a program on its own thread, in the same order as the others; what is asynchronous
or a message is waited for at a later step, drawn by hypothesis. The model is what each step must
give.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from collective_cases import OPS, assert_bits, values
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from ranks import ThreadRanks
from torch import Tensor

from primitives import env, reference

NUM_STEPS = 30
SEEDS = st.integers(0, 2**20)
NUMELS = st.one_of(st.integers(0, 40), st.sampled_from([16_385, 70_001]))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])
Step = Callable[[], None]


class RankThread:
    """Runs the steps of one rank in their order; keeps the first error."""

    def __init__(self) -> None:
        self.steps: SimpleQueue[Step | None] = SimpleQueue()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (step := self.steps.get()) is not None:
            try:
                if self.error is None:
                    step()
            except BaseException as error:
                self.error = error

    def end(self) -> None:
        self.steps.put(None)
        self.thread.join(60)
        assert not self.thread.is_alive(), "a rank hangs"
        if self.error:
            raise self.error


class Machine(RuleBasedStateMachine):
    """Groups: all ranks, the even ones, the odd ones. A rule hands each rank one more step."""

    @initialize(world_size=st.integers(2, 6))
    def start(self, world_size: int) -> None:
        self.world_size = world_size
        members = [list(range(world_size)), list(range(0, world_size, 2))]
        members.append(list(range(1, world_size, 2)))
        self.members = members
        self.groups = [ThreadRanks(len(ranks)) for ranks in members]
        self.ranks = [RankThread() for _ in range(world_size)]
        # What each rank has not waited for: (work, output, what it must be).
        self.pending: list[list[tuple[Any, Tensor, Tensor]]] = [[] for _ in range(world_size)]

    def on(self, group: int, call: Callable[[Any, int, int], None]) -> None:
        """One step of every member: ``call(backend, its rank in the group, its own number)``."""
        for inner, outer in enumerate(self.members[group]):
            backend = self.groups[group].backends[inner]
            self.ranks[outer].steps.put(lambda b=backend, i=inner, o=outer: call(b, i, o))

    def expect(self, rank: int, work: Any, output: Tensor, want: Tensor, queued: bool) -> None:
        """Checks now, or leaves it to a later step."""
        self.pending[rank].append((work, output, want))
        if not queued:
            self.settle(rank, -1)

    def settle(self, rank: int, which: int) -> None:
        work, output, want = self.pending[rank].pop(which)
        work.wait()
        assert_bits(output, want)

    @rule(
        group=st.integers(0, 2),
        op=st.sampled_from(["sum", "max"]),
        numel=NUMELS,
        dtype=DTYPES,
        queued=st.booleans(),
        seed=SEEDS,
    )
    def all_reduce(
        self, group: int, op: str, numel: int, dtype: torch.dtype, queued: bool, seed: int
    ) -> None:
        xs = [values(numel, dtype, seed + r) for r in range(len(self.members[group]))]
        want = reference.reduce(xs, op)

        def call(backend: Any, inner: int, outer: int) -> None:
            x, made = xs[inner].clone(), dist.AllreduceOptions()
            made.reduceOp, made.asyncOp = OPS[op], queued
            self.expect(outer, backend.allreduce([x], made), x, want, queued)

        self.on(group, call)

    @rule(group=st.integers(0, 2), numel=NUMELS, dtype=DTYPES, queued=st.booleans(), seed=SEEDS)
    def all_gather(
        self, group: int, numel: int, dtype: torch.dtype, queued: bool, seed: int
    ) -> None:
        xs = [values(numel, dtype, seed + r) for r in range(len(self.members[group]))]

        def call(backend: Any, inner: int, outer: int) -> None:
            out, made = torch.empty(len(xs) * numel, dtype=dtype), c10d.AllgatherOptions()
            made.asyncOp = queued
            work = backend._allgather_base(out, xs[inner].clone(), made)
            self.expect(outer, work, out, torch.cat(xs), queued)

        self.on(group, call)

    @rule(group=st.integers(0, 2), numel=NUMELS, queued=st.booleans(), seed=SEEDS)
    def all_to_all(self, group: int, numel: int, queued: bool, seed: int) -> None:
        n = len(self.members[group])
        xs = [list(values(numel * n, torch.float32, seed + r).split(numel or 1)) for r in range(n)]
        if numel == 0:
            return
        want = reference.all_to_all(xs)

        def call(backend: Any, inner: int, outer: int) -> None:
            out, made = torch.empty(n * numel), c10d.AllToAllOptions()
            made.asyncOp = queued
            work = backend.alltoall_base(out, torch.cat(xs[inner]), [], [], made)
            self.expect(outer, work, out, torch.cat(want[inner]), queued)

        self.on(group, call)

    @rule(group=st.integers(0, 2), tag=st.integers(0, 3), numel=NUMELS, dtype=DTYPES, seed=SEEDS)
    def messages_around_the_ring(
        self, group: int, tag: int, numel: int, dtype: torch.dtype, seed: int
    ) -> None:
        """Later messages of the same tag come after earlier ones, whatever is between them."""
        n = len(self.members[group])
        xs = [values(numel, dtype, seed + r) for r in range(n)]

        def call(backend: Any, inner: int, outer: int) -> None:
            out, before = torch.empty(numel, dtype=dtype), (inner - 1) % n
            sent = backend.send([xs[inner]], (inner + 1) % n, tag)
            received = backend.recv([out], before, tag)
            self.expect(outer, received, out, xs[before], True)
            self.expect(outer, sent, xs[inner], xs[inner], True)

        self.on(group, call)

    @rule(numel=NUMELS, root=st.integers(0, 5), seed=SEEDS)
    def messages_from_any_source(self, numel: int, root: int, seed: int) -> None:
        """The root takes one message from each other rank, in the order of arrival."""
        n, root = self.world_size, root % self.world_size
        tag = 1000 + seed  # apart from the others: any-source takes what comes first
        xs = [values(numel, torch.float32, seed + r) for r in range(n)]

        def call(backend: Any, inner: int, outer: int) -> None:
            if inner != root:
                self.expect(outer, backend.send([xs[inner]], root, tag), xs[inner], xs[inner], True)
                return
            outs = [torch.empty(numel) for _ in range(n - 1)]
            works = [backend.recv_anysource([out], tag) for out in outs]
            sources = []
            for work, out in zip(works, outs, strict=True):
                work.wait()
                sources.append(work._source_rank())
                assert_bits(out, xs[sources[-1]])
            assert sorted([*sources, root]) == list(range(n))

        self.on(0, call)
        # Tags may repeat when seeds do: nobody sends the next ones before the root has these.
        self.barrier(0)

    @rule(group=st.integers(0, 2))
    def barrier(self, group: int) -> None:
        self.on(group, lambda backend, inner, outer: backend.barrier().wait())

    @precondition(lambda self: hasattr(self, "ranks"))
    @rule(rank=st.integers(0, 5), which=st.integers(0, 99))
    def wait_for_an_earlier_one(self, rank: int, which: int) -> None:
        rank %= self.world_size

        def step() -> None:
            if self.pending[rank]:
                self.settle(rank, which % len(self.pending[rank]))

        self.ranks[rank].steps.put(step)

    def teardown(self) -> None:
        if not hasattr(self, "ranks"):
            return

        def settle_all(rank: int) -> None:
            while self.pending[rank]:
                self.settle(rank, -1)

        try:
            for rank, thread in enumerate(self.ranks):
                thread.steps.put(lambda r=rank: settle_all(r))
            for thread in self.ranks:
                thread.end()
        except BaseException:
            for group in self.groups:
                for backend in group.backends:
                    backend.abort()
            raise
        finally:
            for group in self.groups:
                group.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=max(10, int(env.PROPERTY_CASES.get()) // 30),
    stateful_step_count=NUM_STEPS,
    deadline=None,
)


def test_the_machine_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model must be able to disagree: with another order of the sum it does."""
    machine = Machine()
    machine.start(world_size=3)
    real = reference.reduce
    monkeypatch.setattr(reference, "reduce", lambda xs, op: real([xs[1], xs[2], xs[0]], op))
    machine.all_reduce(0, "sum", 40, torch.float32, True, 1)
    with pytest.raises(AssertionError, match="differ"):
        machine.teardown()
