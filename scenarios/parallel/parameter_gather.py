"""New parameters on their way back to the model, overlapped with the next forward pass."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from scenarios.parallel.buckets import Bucket
from scenarios.parallel.layers import Layer
from scenarios.parallel.mesh import Mesh


class ParameterGather:
    """Gathers the buckets' new parameters in order of use.

    With overlap, a forward pre-hook of each layer waits for the layer's bucket and then starts
    the next bucket's all_gather, as Megatron-LM does; without, ``start`` gathers everything.

    Args:
        buckets: as ``make_buckets`` gave them (the last one is used first).
        layers: the model's layers, in order of use; their hooks are installed here.
        overlap: see above.
        mesh: its dp (of experts: expert_dp) group; without ZeRO nothing is gathered.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        layers: Sequence[Layer],
        overlap: bool,
        mesh: Mesh,
    ):
        self._buckets = list(reversed(buckets))
        self._overlap = overlap
        self._mesh = mesh
        self._num_started = len(self._buckets)
        self._num_done = len(self._buckets)
        self._work: dist.Work | None = None
        self._parameters = {
            spec.name: layer.get_parameter(spec.name.rpartition(".")[2])
            for layer in layers
            for spec in layer.specs
        }
        bucket_of = {spec.name: i for i, b in enumerate(self._buckets) for spec in b.specs}
        for layer in layers:
            last = max(bucket_of[spec.name] for spec in layer.specs)

            def wait(_module: Any, _args: Any, last: int = last) -> None:
                self._finish_through(last)

            layer.register_forward_pre_hook(wait)

    def start(self) -> None:
        """Begins to gather the parameters that the optimizer has just changed."""
        self.finish()
        self._num_started = self._num_done = 0
        for bucket in self._buckets:
            bucket.round_parameters()
        if self._overlap:
            self._start_next()
        else:
            self.finish()

    def finish(self) -> None:
        """Waits until the model has all its new parameters."""
        self._finish_through(len(self._buckets) - 1)

    def _start_next(self) -> None:
        bucket = self._buckets[self._num_started]
        self._work = None
        if bucket.dp > 1:
            self._work = self._mesh.replicas(bucket.expert).all_gather_into(
                bucket.parameter_full.view(-1), bucket.parameter_shard, async_op=self._overlap
            )
        self._num_started += 1

    def _finish_through(self, last: int) -> None:
        while self._num_done <= last:
            if self._num_started == self._num_done:
                self._start_next()
            if self._work is not None:
                self._work.wait()
            bucket = self._buckets[self._num_done]
            self._num_done += 1
            if self._overlap and self._num_started < len(self._buckets):
                self._start_next()
            for spec in bucket.specs:
                bucket.read_parameter(spec, self._parameters[spec.name])
