"""One microbatch on its way through the model, and where its gradients go."""

from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from primitives import canonical
from scenarios.data import Batch
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
    def of(cls, index: int, batch: Batch, seed: int, gradients: GradientSink) -> Self:
        """From a batch as the data set gives it."""
        return cls(
            index,
            batch.tokens.t().reshape(-1),
            batch.labels.t().reshape(-1),
            batch.sample_index,
            batch.tokens.shape[1],
            seed,
            gradients,
        )

    @property
    def num_samples(self) -> int:
        """Samples of the microbatch."""
        return self.sample_index.numel()

    def softmax(self, scores: Tensor, heads_per_part: int, scale: float) -> Tensor:
        """Attention probabilities: here each query sees the tokens up to its own.

        Args:
            scores: [parts * samples * heads_per_part, s, s].
            heads_per_part: see there.
            scale: factor of the scores.
        """
        return canonical.causal_softmax(scores, scale)

    def softmax_backward(
        self, dprobs: Tensor, probs: Tensor, heads_per_part: int, scale: float
    ) -> Tensor:
        """The gradient of ``softmax``."""
        return canonical.causal_softmax_backward(dprobs, probs, scale)

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
