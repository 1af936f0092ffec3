"""ZeRO-1 AdamW: each data-parallel rank keeps and steps its slices of the fp32 main parameters.

Leaves: whatever is summed or hashed over the whole model is first computed per leaf, that is per
(parameter, canonical block, slice); the leaves are gathered and put in sorted order, so that no
result knows how many ranks held them.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from primitives import canonical
from primitives.layout import NUM_SLICES
from scenarios.parallel.buckets import Bucket, Shard
from scenarios.parallel.parameters import ParameterSpec
from scenarios.parallel.random_keys import random_key

NORM_EPSILON = 1e-6
"""Megatron-LM's: the gradients are multiplied by max_norm / (norm + this)."""


@dataclass(frozen=True)
class AdamConfig:
    """What AdamW and the clipping need."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_norm: float
    """Largest global gradient norm; 0 turns clipping off."""


class DistributedOptimizer:
    """Main parameters, moments and the update of one data-parallel rank.

    Args:
        buckets: as ``make_buckets`` gave them.
        config: hyperparameters.
        group: the data-parallel group.
    """

    def __init__(
        self, buckets: Sequence[Bucket], config: AdamConfig, group: dist.ProcessGroup | None
    ):
        self._group = group
        self._dp, self._dp_rank = dist.get_world_size(group), dist.get_rank(group)
        self._config = config
        shards = [shard for bucket in buckets for shard in bucket.shards.values()]
        self.shards: list[Shard] = sorted(shards, key=lambda shard: shard.spec.name)
        self.num_updates = 0
        self._beta_powers = [1.0, 1.0]

    def local_slices(self) -> range:
        """The slices of each block that this rank owns."""
        return range(
            self._dp_rank * NUM_SLICES // self._dp, (self._dp_rank + 1) * NUM_SLICES // self._dp
        )

    def initialize(self, seed: int) -> None:
        """Draws the main parameters: a function of the seed, the name and the element's index."""
        for shard in self.shards:
            spec = shard.spec
            full = torch.full(spec.shape, spec.init_mean)
            if spec.init_std:
                key = random_key(seed, "init", spec.name)
                full = canonical.random_normal(spec.shape, key) * spec.init_std
            blocks = full.view(spec.num_blocks, NUM_SLICES, spec.slice_numel)
            mine = self.local_slices()
            shard.main.copy_(blocks[:, mine.start : mine.stop])

    def set_num_updates(self, num_updates: int) -> None:
        """After a load: repeats the multiplications that gave the powers of the betas."""
        self.num_updates = 0
        self._beta_powers = [1.0, 1.0]
        for _ in range(num_updates):
            self._count_update()

    def _count_update(self) -> None:
        self.num_updates += 1
        self._beta_powers[0] *= self._config.beta1
        self._beta_powers[1] *= self._config.beta2

    def unscale(self, loss_scale: float) -> bool:
        """Divides by the loss scale; returns whether all gradients of this rank are finite."""
        finite = True
        for shard in self.shards:
            if loss_scale != 1.0:
                shard.grad.mul_(1.0 / loss_scale)
            finite = finite and bool(torch.isfinite(shard.grad).all())
        return finite

    def gradient_leaves(self) -> Tensor:
        """[leaves] fp32: this rank's sums of squares of the gradients."""
        return torch.cat([canonical.sum_of_squares(s.grad).view(-1) for s in self.shards])

    def parameter_leaves(self) -> Tensor:
        """[leaves] fp32: this rank's sums of squares of the main parameters."""
        return torch.cat([canonical.sum_of_squares(s.main).view(-1) for s in self.shards])

    def digest_leaves(self, kind: str) -> Tensor:
        """[leaves, 32] uint8: SHA-256 of this rank's slices of ``main``, ``exp_avg``, ..."""
        raw = bytearray()
        for shard in self.shards:
            values: Tensor = getattr(shard, kind)
            width = values.shape[-1] * values.element_size()
            data = values.numpy().tobytes()
            for start in range(0, len(data), width):
                raw += hashlib.sha256(data[start : start + width]).digest()
        return torch.frombuffer(raw, dtype=torch.uint8).view(-1, 32)

    def sort_leaves(self, gathered: Tensor) -> Tensor:
        """Puts leaves gathered from all ranks in the order (name, block, slice).

        Args:
            gathered: [dp, leaves of one rank, ...].
        Returns:
            [all leaves, ...]
        """
        pieces, start = [], 0
        for shard in self.shards:
            blocks, slices = shard.main.shape[:2]
            piece = gathered[:, start : start + blocks * slices]
            start += blocks * slices
            piece = piece.reshape(self._dp, blocks, slices, *gathered.shape[2:])
            pieces.append(piece.transpose(0, 1).reshape(-1, *gathered.shape[2:]))
        return torch.cat(pieces)

    def leaf_names(self) -> list[str]:
        """The names of all leaves in sorted order."""
        return [
            leaf_name(shard.spec, block, index)
            for shard in self.shards
            for block in range(shard.spec.num_blocks)
            for index in range(NUM_SLICES)
        ]

    def clip(self, norm: float) -> None:
        """Scales the gradients down to the largest allowed global norm."""
        if self._config.max_norm <= 0:
            return
        coefficient = self._config.max_norm / (norm + NORM_EPSILON)
        if coefficient < 1.0:
            for shard in self.shards:
                shard.grad.mul_(coefficient)

    def count_zeros(self) -> int:
        """Exact zeros in this rank's gradients."""
        return sum(canonical.count_zeros(shard.grad) for shard in self.shards)

    def step(self, lr: float) -> None:
        """AdamW on this rank's slices; 1-D parameters and biases do not decay."""
        self._count_update()
        config = self._config
        for shard in self.shards:
            canonical.adam_step(
                shard.main,
                shard.grad,
                shard.exp_avg,
                shard.exp_avg_sq,
                lr=lr,
                beta1=config.beta1,
                beta2=config.beta2,
                eps=config.eps,
                weight_decay=config.weight_decay if shard.spec.weight_decay else 0.0,
                bias_correction1=1.0 - self._beta_powers[0],
                bias_correction2_sqrt=math.sqrt(1.0 - self._beta_powers[1]),
            )


def leaf_name(spec: ParameterSpec, block: int, index: int) -> str:
    """How a leaf is called in checkpoints and messages."""
    return f"{spec.name}.block{block}.slice{index}"


def norm_of_leaves(leaves: Tensor) -> float:
    """sqrt of the fp64 sum, in order, of sums of squares.

    Numerics: a plain loop, because the built-in ``sum`` of Python 3.12 compensates and that of
    3.11 does not.
    """
    total = 0.0
    for value in leaves.tolist():
        total += value
    return math.sqrt(total)
