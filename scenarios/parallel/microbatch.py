"""One microbatch on its way through the model, and where its gradients go."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from scenarios.parallel.random_keys import random_key


class GradientSink(Protocol):
    """Receives weight gradients from the backward of the layers."""

    def push(self, name: str, microbatch: int, gradient: Tensor) -> None:
        """Takes ownership of one fp32 gradient of one accumulator of one microbatch."""


@dataclass(frozen=True)
class Microbatch:
    """Tokens in the order of the model: t = position * num_samples + sample.

    In this order a slice of positions, as sequence parallelism cuts them, is a run of tokens.
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

    @classmethod
    def create(
        cls,
        index: int,
        tokens: Tensor,
        labels: Tensor,
        sample_index: Tensor,
        seed: int,
        gradients: GradientSink,
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
        )

    @property
    def num_samples(self) -> int:
        """Samples of the microbatch."""
        return self.sample_index.numel()

    def dropout_key(self, layer: int | str, site: str) -> int:
        """The key of one dropout site."""
        return random_key(self.seed, "dropout", layer, site)

    def token_ids(self) -> Tensor:
        """[tokens] int64: a number of its own for every token of the run, for dropout."""
        positions = self.sample_index.new_tensor(range(self.seq_length))
        return (self.sample_index[None, :] * self.seq_length + positions[:, None]).reshape(-1)

    def attention_row_ids(self, num_heads: int, num_parts: int) -> Tensor:
        """[parts * samples * heads / parts * positions] int64: the same for attention rows."""
        heads = self.sample_index.new_tensor(range(num_heads)).view(num_parts, 1, -1, 1)
        positions = self.sample_index.new_tensor(range(self.seq_length))
        sample_heads = self.sample_index.view(1, -1, 1, 1) * num_heads + heads
        return (sample_heads * self.seq_length + positions).reshape(-1)
