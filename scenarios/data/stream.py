"""The endless stream of training samples and how a scenario chooses it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from scenarios.data.documents import DocumentStream
from scenarios.data.indexed import IndexedDataset
from scenarios.data.synthetic import MarkovCorpus
from scenarios.scenario import Scenario


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of the stream."""

    tokens: torch.Tensor
    """[b, s] int64."""
    labels: torch.Tensor
    """[b, s] int64: the token after each token."""
    sample_index: torch.Tensor
    """[b] int64: number of each sample in the stream."""


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
        if first_sample < 0 or num < 1:
            raise ValueError(
                f"batch: got first_sample {first_sample}, num {num}, expected at least 0 and 1"
            )
        sequences = torch.from_numpy(self._source.samples(first_sample, num))
        return Batch(
            tokens=sequences[:, :-1].contiguous(),
            labels=sequences[:, 1:].contiguous(),
            sample_index=torch.arange(first_sample, first_sample + num),
        )


def make_dataset(scenario: Scenario) -> Dataset:
    """The training data of a scenario.

    Args:
        scenario: its seed, sequence length, vocabulary and data prefix are used, its layout is not.
    Returns:
        The dataset.
    Raises:
        ValueError: data files that are missing, corrupt or too small.
    """
    model, seed = scenario.model, scenario.training.seed
    if scenario.data.prefix is None:
        return Dataset(MarkovCorpus(model.vocab_size, model.seq_length, seed))
    files = IndexedDataset(scenario.data.prefix)
    return Dataset(
        DocumentStream(files, model.vocab_size, model.seq_length, seed, scenario.data.split)
    )
