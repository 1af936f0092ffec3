"""Parameters in buckets, and this rank's slices of them.

[Note: bucket layout] A bucket's flat gradient buffer is [dp, partials, blocks, slices / dp, slice]
per parameter: the outermost dim is the rank that will own the values. So one reduce_scatter does
the data-parallel level of the tree for the whole bucket, every element is summed with the same
partners in every layout and bucket size, and each rank receives whole slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from primitives.layout import NUM_SLICES
from scenarios.parallel.parameters import ParameterSpec

CPU = torch.device("cpu")


@dataclass
class Shard:
    """One parameter's slices on this rank: views [blocks, local slices, slice numel] fp32."""

    spec: ParameterSpec
    main: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Bucket:
    """Some parameters whose gradients travel, and whose new values return, in one collective.

    Args:
        specs: this rank's part of the parameters, in order of use in the forward pass.
        dp: over how many data-parallel ranks slices are shared out; it divides NUM_SLICES. 1
            without ZeRO: every rank owns all slices.
        dtype: the compute dtype of the parameters.
        device: of the parameters.

    Contract: all parameters are of experts, or none is.
    """

    def __init__(
        self,
        specs: Sequence[ParameterSpec],
        dp: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ):
        self.specs = tuple(specs)
        self.expert = self.specs[0].expert
        self.dp = dp
        self.local_slices = NUM_SLICES // dp
        self._gradient_start: dict[str, int] = {}
        gradient_numel = shard_numel = 0
        for spec in self.specs:
            self._gradient_start[spec.name] = gradient_numel
            gradient_numel += spec.num_partials * spec.numel // dp
            shard_numel += spec.numel // dp
        self.gradient_full = torch.zeros(dp, gradient_numel, device=device)
        self.parameter_full = torch.zeros(dp, shard_numel, dtype=dtype, device=device)
        # What is not shared out is its own shard.
        self.gradient_shard, self.parameter_shard = self.gradient_full[0], self.parameter_full[0]
        if dp > 1:
            self.gradient_shard = torch.zeros(gradient_numel, device=device)
            self.parameter_shard = torch.zeros(shard_numel, dtype=dtype, device=device)
        self._state = torch.zeros(4, shard_numel, device=device)
        self.shards: dict[str, Shard] = {}
        start = 0
        for spec in self.specs:
            views = [
                flat[start : start + spec.numel // dp].view(
                    spec.num_blocks, self.local_slices, spec.slice_numel
                )
                for flat in self._state
            ]
            self.shards[spec.name] = Shard(spec, *views)
            start += spec.numel // dp

    def write_gradient(self, spec: ParameterSpec, first_partial: int, gradient: Tensor) -> None:
        """Puts one accumulator's sum, [partials_per_gradient, *spec.shape], into the buffer."""
        count, start = spec.partials_per_gradient, self._gradient_start[spec.name]
        numel = spec.num_partials * spec.numel // self.dp
        target = self.gradient_full[:, start : start + numel].view(
            self.dp, spec.num_partials, spec.num_blocks, self.local_slices, spec.slice_numel
        )
        source = gradient.view(count, spec.num_blocks, self.dp, self.local_slices, spec.slice_numel)
        target[:, first_partial : first_partial + count].copy_(source.permute(2, 0, 1, 3, 4))

    def read_gradient(self, spec: ParameterSpec) -> Tensor:
        """One parameter's data-parallel sums, [partials, blocks, local slices, slice numel]."""
        start = self._gradient_start[spec.name]
        numel = spec.num_partials * spec.numel // self.dp
        return self.gradient_shard[start : start + numel].view(
            spec.num_partials, spec.num_blocks, self.local_slices, spec.slice_numel
        )

    def round_parameters(self) -> None:
        """Rounds the fp32 main parameters to the compute dtype, ready for the all_gather."""
        self.parameter_shard.copy_(self._state[0])

    def read_parameter(self, spec: ParameterSpec, out: Tensor) -> None:
        """Copies one gathered parameter into the model's tensor."""
        start = 0
        for other in self.specs:
            if other.name == spec.name:
                break
            start += other.numel // self.dp
        flat = self.parameter_full[:, start : start + spec.numel // self.dp]
        source = flat.view(self.dp, spec.num_blocks, self.local_slices, spec.slice_numel)
        target = out.view(spec.num_blocks, self.dp, self.local_slices, spec.slice_numel)
        target.copy_(source.transpose(0, 1))


def make_buckets(
    specs: Sequence[ParameterSpec],
    dp: int,
    dtype: torch.dtype,
    bucket_numel: int,
    expert_dp: int = 1,
    device: torch.device = CPU,
) -> list[Bucket]:
    """Cuts the parameters into buckets in the order their gradients become ready.

    Args:
        specs: in order of use in the forward pass; backward finishes them in reverse.
        dp: over how many data-parallel ranks slices are shared out.
        dtype: compute dtype.
        bucket_numel: a bucket is closed as soon as it holds this many elements.
        expert_dp: the same as ``dp`` for parameters of experts, which get buckets of their own.
        device: of the parameters.

    Raises:
        ValueError: dp or expert_dp does not divide NUM_SLICES.
    """
    num_owners = {False: dp, True: expert_dp}
    for size in num_owners.values():
        if size < 1 or NUM_SLICES % size:
            raise ValueError(f"data-parallel size is {size}; expected a divisor of {NUM_SLICES}")
    buckets: list[Bucket] = []
    pending: dict[bool, list[ParameterSpec]] = {False: [], True: []}
    for spec in reversed(specs):
        waiting = pending[spec.expert]
        waiting.insert(0, spec)
        if sum(other.numel for other in waiting) >= bucket_numel:
            buckets.append(Bucket(waiting, num_owners[spec.expert], dtype, device))
            pending[spec.expert] = []
    for expert, waiting in pending.items():
        if waiting:
            buckets.append(Bucket(waiting, num_owners[expert], dtype, device))
    return buckets


def default_bucket_numel(specs: Sequence[ParameterSpec], dp: int) -> int:
    """Megatron-LM's bucket size, but small models still get four buckets, so that they overlap."""
    total = sum(spec.numel for spec in specs)
    return min(max(40_000_000, 1_000_000 * dp), -(-total // 4))
