"""AdamW on the fp32 main parameters of one rank.

With ZeRO-1 each data-parallel rank keeps and steps its slices of what its tp ranks and stage hold;
without, all slices. What is summed or hashed over the whole model is computed per leaf
(``scenarios/parallel/leaves.py``).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from primitives.arithmetic import kernels
from primitives.layout import NUM_SLICES
from scenarios.parallel.buckets import Bucket, Shard
from scenarios.parallel.leaves import LeafRun, LeafTable
from scenarios.parallel.mesh import Mesh
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
    """Main parameters, moments and the update of one rank.

    Args:
        buckets: as ``make_buckets`` gave them.
        config: hyperparameters.
        mesh: this rank's place; its world group gathers leaves.

    Contract: collective over all ranks of the mesh.
    """

    def __init__(self, buckets: Sequence[Bucket], config: AdamConfig, mesh: Mesh):
        self._config = config
        shards = [shard for bucket in buckets for shard in bucket.shards.values()]
        self.shards: list[Shard] = sorted(shards, key=lambda shard: shard.spec.name)
        self.runs = [_leaf_run(shard, mesh) for shard in self.shards]
        """The leaves of each shard."""
        self.leaves = LeafTable.exchange(self.runs, mesh.world)
        self.num_updates = 0
        self._beta_powers = [1.0, 1.0]

    def initialize(self, seed: int) -> None:
        """Draws the main parameters: a function of the seed, the name and the element's index."""
        for shard, run in zip(self.shards, self.runs, strict=True):
            spec = shard.spec
            full = torch.full(spec.shape, spec.init_mean)
            if spec.init_std:
                key = random_key(seed, "init", spec.name)
                first = spec.first_block * (spec.numel // spec.num_blocks)
                full = kernels.random_normal(spec.shape, key, first) * spec.init_std
            blocks = full.view(spec.num_blocks, NUM_SLICES, spec.slice_numel)
            shard.main.copy_(blocks[:, run.slices.start : run.slices.stop])

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
        """[leaves] fp32 on the host: this rank's sums of squares of the gradients."""
        return torch.cat([kernels.sum_of_squares(s.grad).view(-1) for s in self.shards]).cpu()

    def parameter_leaves(self) -> Tensor:
        """[leaves] fp32 on the host: this rank's sums of squares of the main parameters."""
        return torch.cat([kernels.sum_of_squares(s.main).view(-1) for s in self.shards]).cpu()

    def digest_leaves(self, kind: str) -> Tensor:
        """[leaves, 32] uint8 on the host: SHA-256 of this rank's slices of ``main`` and others."""
        raw = bytearray()
        for shard in self.shards:
            values: Tensor = getattr(shard, kind)
            width = values.shape[-1] * values.element_size()
            data = values.cpu().numpy().tobytes()
            for start in range(0, len(data), width):
                raw += hashlib.sha256(data[start : start + width]).digest()
        return torch.frombuffer(raw, dtype=torch.uint8).view(-1, 32)

    def clip(self, norm: float) -> None:
        """Scales the gradients down to the largest allowed global norm."""
        if self._config.max_norm <= 0:
            return
        coefficient = self._config.max_norm / (norm + NORM_EPSILON)
        if coefficient < 1.0:
            for shard in self.shards:
                shard.grad.mul_(coefficient)

    def count_zeros(self) -> int:
        """Exact zeros in the gradients for which this rank speaks: all ranks' sum counts each."""
        return sum(
            kernels.count_zeros(shard.grad)
            for shard, owned in zip(self.shards, self.leaves.owned, strict=True)
            if owned
        )

    def step(self, lr: float) -> None:
        """AdamW on this rank's slices; 1-D parameters and biases do not decay."""
        self._count_update()
        config = self._config
        for shard in self.shards:
            kernels.adam_step(
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


def _leaf_run(shard: Shard, mesh: Mesh) -> LeafRun:
    spec, (num_blocks, num_slices) = shard.spec, shard.main.shape[:2]
    first_slice = mesh.replicas(spec.expert).rank * num_slices % NUM_SLICES
    return LeafRun(
        spec.name,
        spec.total_blocks,
        range(spec.first_block, spec.first_block + num_blocks),
        range(first_slice, first_slice + num_slices),
    )


def norm_of_leaves(leaves: Tensor) -> float:
    """sqrt of the fp64 sum, in order, of sums of squares.

    Numerics: a plain loop, because the built-in ``sum`` of Python 3.12 compensates and that of
    3.11 does not.
    """
    total = 0.0
    for value in leaves.tolist():
        total += value
    return math.sqrt(total)
