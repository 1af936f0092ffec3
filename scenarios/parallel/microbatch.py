"""One microbatch on its way through the model, and where its gradients go."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from primitives.arithmetic import kernels
from primitives.layout import NUM_PARTS
from scenarios.parallel.mesh import Mesh
from scenarios.parallel.random_keys import random_key


class GradientSink(Protocol):
    """Receives weight gradients from the backward of the layers."""

    def push(self, name: str, microbatch: int, gradient: Tensor) -> None:
        """Takes ownership of one fp32 gradient of one accumulator of one microbatch."""


@dataclass(frozen=True)
class Microbatch:
    """Tokens in the order of the model: t = position * num_samples + sample.

    In this order a slice of positions, as sequence parallelism cuts them, is a run of tokens.
    "Local" tokens are this rank's run with sequence parallelism, and all tokens without.
    """

    index: int
    """Global index within the step: the leaf of the gradient tree."""
    tokens: Tensor
    """[tokens] int64"""
    labels: Tensor
    """[tokens] int64"""
    sample_index: Tensor
    """[samples] int64, global over the whole run: it keys dropout."""
    seq_length: int
    seed: int
    gradients: GradientSink
    mesh: Mesh
    loss_weight: float = 1.0
    """What the mean loss of this microbatch weighs in what is differentiated."""
    aux_losses: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> its load-balancing loss [] fp32, put there by the forward pass."""

    @classmethod
    def create(
        cls,
        index: int,
        tokens: Tensor,
        labels: Tensor,
        sample_index: Tensor,
        seed: int,
        gradients: GradientSink,
        mesh: Mesh,
        loss_weight: float = 1.0,
    ) -> "Microbatch":
        """From ``tokens`` and ``labels`` [samples, seq_length] as the data set gives them."""
        return cls(
            index,
            tokens.t().reshape(-1),
            labels.t().reshape(-1),
            sample_index,
            tokens.shape[1],
            seed,
            gradients,
            mesh,
            loss_weight,
        )

    def aux_losses_by_layer(self) -> Tensor:
        """[layers of this stage that have one] fp32."""
        values = [self.aux_losses[layer] for layer in sorted(self.aux_losses)]
        return torch.stack(values) if values else torch.empty(0)

    @property
    def num_samples(self) -> int:
        """Samples of the microbatch."""
        return self.sample_index.numel()

    @property
    def local_slice(self) -> slice:
        """The local tokens among all."""
        return self.mesh.token_slice(self.tokens.numel())

    @property
    def num_token_blocks(self) -> int:
        """Canonical token blocks of the local tokens."""
        return NUM_PARTS // self.mesh.tp.num_ranks if self.mesh.sp else NUM_PARTS

    def softmax(self, scores: Tensor, heads_per_part: int, scale: float) -> Tensor:
        """Attention probabilities: here each query sees the tokens up to its own.

        Args:
            scores: [local parts * samples * heads_per_part, s, s].
            heads_per_part: see there.
            scale: factor of the scores.
        """
        return kernels.causal_softmax(scores, scale)

    def softmax_backward(
        self, dprobs: Tensor, probs: Tensor, heads_per_part: int, scale: float
    ) -> Tensor:
        """The gradient of ``softmax``."""
        return kernels.causal_softmax_backward(dprobs, probs, scale)

    def dropout_key(self, layer: int | str, site: str) -> int:
        """The key of one dropout site."""
        return random_key(self.seed, "dropout", layer, site)

    def token_ids(self) -> Tensor:
        """[local tokens] int64: a number of its own for every token of the run, for dropout."""
        positions = torch.arange(self.seq_length, device=self.sample_index.device)
        ids = (self.sample_index[None, :] * self.seq_length + positions[:, None]).reshape(-1)
        return ids[self.local_slice]

    def attention_row_ids(self, heads_per_part: int) -> Tensor:
        """[local parts * samples * heads per part * positions] int64, for attention rows."""
        tp = self.mesh.tp
        num_parts = NUM_PARTS // tp.num_ranks
        first = tp.rank * num_parts * heads_per_part
        end = first + num_parts * heads_per_part
        heads = torch.arange(first, end, device=self.sample_index.device)
        positions = torch.arange(self.seq_length, device=self.sample_index.device)
        num_heads = NUM_PARTS * heads_per_part
        rows = self.sample_index.view(1, -1, 1, 1) * num_heads + heads.view(num_parts, 1, -1, 1)
        return (rows * self.seq_length + positions).reshape(-1)
