"""Batches of consecutive samples, read from a source of token sequences."""

from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of the stream."""

    tokens: torch.Tensor
    """[b, s] int64."""
    labels: torch.Tensor
    """[b, s] int64: the token after each token."""
    sample_index: torch.Tensor
    """[b] int64: number of each sample in the stream."""

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


class SampleSource(Protocol):
    """Sequences of ``seq_length + 1`` tokens by number."""

    def samples(self, first_sample: int, num: int) -> NDArray[np.int64]:
        """[num, seq_length + 1] token ids of samples first_sample, first_sample + 1, ..."""


class Dataset:
    """Batches of a sample source; every call with the same arguments gives the same batch."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def batch(self, first_sample: int, num: int) -> Batch:
        """Read consecutive samples.

        Args:
            first_sample: number of the first one in the stream, from 0; there is no last one.
            num: how many.
        Returns:
            The batch on the CPU, contiguous.
        Raises:
            ValueError: a negative number, or a token id outside the model's vocabulary.
        """
        sequences = torch.from_numpy(self.sequences(first_sample, num))
        return Batch(
            tokens=sequences[:, :-1].contiguous(),
            labels=sequences[:, 1:].contiguous(),
            sample_index=torch.arange(first_sample, first_sample + num),
        )

    def sequences(self, first_sample: int, num: int) -> NDArray[np.int64]:
        """What the source has: [num, tokens of a sample] token ids; errors as of ``batch``."""
        if first_sample < 0 or num < 1:
            raise ValueError(
                f"batch: got first_sample {first_sample}, num {num}, expected at least 0 and 1"
            )
        return self._source.samples(first_sample, num)
