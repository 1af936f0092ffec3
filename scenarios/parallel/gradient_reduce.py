"""From microbatch gradients to this rank's slices of their sum.

The order of every sum: microbatches of a rank -> ranks of dp (reduce_scatter, or all_reduce without
ZeRO) -> token blocks, those of this rank and then those of the tp ranks -> lookup and head of the
tied table, of this rank or of first and last stage. Together the first two are one tree over all
microbatches of the step.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from primitives.arithmetic import kernels
from primitives.rank_group import RankGroup
from scenarios.parallel.buckets import Bucket, Shard
from scenarios.parallel.mesh import Mesh
from scenarios.parallel.parameters import ParameterSpec
from scenarios.parallel.tree import TreeAccumulator


class GradientReducer:
    """Accumulates gradients by global microbatch and reduces a bucket once it is complete.

    Args:
        buckets: in the order their gradients become ready.
        num_microbatches: of the whole step, over all ranks.
        overlap: start a bucket's reduction during backward instead of at the end.
        mesh: gradients are summed over its dp (of experts: expert_dp), then its tp and embedding
            groups.

    Contract: all ranks complete the buckets in the same order; the collectives are issued in
    bucket order.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        num_microbatches: int,
        overlap: bool,
        mesh: Mesh,
    ):
        self._buckets = buckets
        self._overlap = overlap
        self._mesh = mesh
        dp = mesh.dp.num_ranks
        if num_microbatches % dp:
            raise ValueError(
                f"{num_microbatches} microbatches on {dp} data-parallel ranks; expected a multiple"
            )
        self._places: dict[str, tuple[Bucket, ParameterSpec, int]] = {}
        self._accumulators: dict[str, TreeAccumulator] = {}
        for bucket in buckets:
            replicas = mesh.replicas(bucket.expert)
            per_rank = num_microbatches // replicas.num_ranks
            for spec in bucket.specs:
                for i, name in enumerate(spec.gradients):
                    self._places[name] = (bucket, spec, i * spec.partials_per_gradient)
                    self._accumulators[name] = TreeAccumulator(
                        num_microbatches, replicas.rank * per_rank, per_rank
                    )
        self._missing: dict[int, int] = {}
        self._works: list[dist.Work | None] = []
        self._begin()

    def _begin(self) -> None:
        self._missing = {
            i: sum(len(spec.gradients) for spec in bucket.specs)
            for i, bucket in enumerate(self._buckets)
        }
        self._works = []

    def push(self, name: str, microbatch: int, gradient: Tensor) -> None:
        """Takes ownership of one gradient; starts every bucket that is complete by it.

        Args:
            name: the accumulator.
            microbatch: global index in the step.
            gradient: fp32, [partials_per_gradient, *parameter shape].
        """
        accumulator = self._accumulators[name]
        accumulator.add(microbatch, gradient)
        if not accumulator.complete:
            return
        bucket, spec, first_partial = self._places[name]
        bucket.write_gradient(spec, first_partial, accumulator.take())
        self._missing[self._buckets.index(bucket)] -= 1
        while self._overlap and len(self._works) < len(self._buckets):
            if self._missing[len(self._works)]:
                break
            self._reduce_next()

    def _reduce_next(self) -> None:
        bucket = self._buckets[len(self._works)]
        dp, full = self._mesh.replicas(bucket.expert), bucket.gradient_full.view(-1)
        if bucket.dp == 1:
            work = dp.all_reduce(full, async_op=self._overlap)
        else:
            work = dp.reduce_scatter_into(bucket.gradient_shard, full, async_op=self._overlap)
        self._works.append(work)

    def finish(self) -> None:
        """Waits for all buckets and leaves each parameter's gradient in its shard.

        Raises:
            ValueError: a gradient of this step has not been pushed.
        """
        incomplete = [i for i, missing in self._missing.items() if missing]
        if incomplete:
            raise ValueError(f"buckets {incomplete} still wait for gradients at the end of a step")
        while len(self._works) < len(self._buckets):
            self._reduce_next()
        for bucket, work in zip(self._buckets, self._works, strict=True):
            if work is not None:
                work.wait()
            for shard in bucket.shards.values():
                partials = bucket.read_gradient(shard.spec)
                if len(partials) == 1:
                    shard.grad.copy_(partials[0])
                else:
                    shard.grad.copy_(kernels.tree_sum(partials))
        shards = [shard for bucket in self._buckets for shard in bucket.shards.values()]
        if self._mesh.sp:
            _all_reduce([s for s in shards if s.spec.sums_tokens], self._mesh.tp)
        _all_reduce([s for s in shards if s.spec.tied], self._mesh.embedding)
        self._begin()


def _all_reduce(shards: Sequence[Shard], group: RankGroup) -> None:
    """Sums gradients over a group in one collective."""
    if not shards or group.num_ranks == 1:
        return
    flat = torch.cat([shard.grad.view(-1) for shard in shards])
    group.all_reduce(flat)
    pieces = torch.split(flat, [shard.grad.numel() for shard in shards])
    for shard, piece in zip(shards, pieces, strict=True):
        shard.grad.copy_(piece.view_as(shard.grad))
