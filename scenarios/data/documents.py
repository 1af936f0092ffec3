"""Samples cut from the documents of token files: shuffled, joined end to end, without an end."""

from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from scenarios.data.indexed import IndexedDataset
from scenarios.data.keyed_hash import keyed_permutation

_DOCUMENTS, _SAMPLES = 3, 4


class DocumentStream:
    """The training part of token files as an endless stream of samples.

    In epoch e the training documents, shuffled by (seed, e), are joined; the epochs follow each
    other without a break. A sample is seq_length + 1 tokens of that text, the last of which is the
    first of the next sample. The samples that start in one epoch are shuffled by (seed, e).
    Source: megatron.core.datasets.gpt_dataset has the same structure, with shuffles of numpy's
    generator state and an index over a planned number of epochs.
    """

    def __init__(
        self,
        files: IndexedDataset,
        vocab_size: int,
        seq_length: int,
        seed: int,
        split: tuple[str, ...],
    ) -> None:
        """Open the stream.

        Args:
            files: the token files.
            vocab_size: token ids must be below it.
            seq_length: tokens the model sees.
            seed: of the shuffles.
            split: weights of training, validation and test documents.
        Raises:
            ValueError: there is nothing to train on.
        """
        self._files = files
        self._vocab_size = vocab_size
        self._seq_length = seq_length
        self._seed = seed
        num_documents = train_documents(files.num_documents, split)
        self._lengths = files.document_lengths[:num_documents]
        self._num_tokens = int(self._lengths.sum())
        if self._num_tokens == 0:
            raise ValueError(
                f"{files.prefix}: split {','.join(split)} leaves {num_documents} of "
                f"{files.num_documents} documents with 0 tokens to train on, "
                "expected at least 1 token"
            )
        self._document_order = lru_cache(maxsize=3)(self._shuffle_documents)
        self._sample_order = lru_cache(maxsize=3)(self._shuffle_samples)

    def samples(self, first_sample: int, num: int) -> NDArray[np.int64]:
        """Token ids of consecutive samples.

        Args:
            first_sample: number of the first one.
            num: how many.
        Returns:
            int64 [num, seq_length + 1].
        Raises:
            ValueError: a token id outside the vocabulary.
        """
        width = self._seq_length + 1
        rows = [self._read(self._start(first_sample + i), width) for i in range(num)]
        sequences = np.stack(rows)
        low, high = int(sequences.min()), int(sequences.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(
                f"{self._files.prefix}: got token id {low if low < 0 else high}, "
                f"expected 0 to {self._vocab_size - 1}, the vocabulary of the model"
            )
        return sequences

    def _start(self, sample: int) -> int:
        """Where a sample starts in the joined text of all epochs."""
        epoch = sample * self._seq_length // self._num_tokens
        first = self._first_sample(epoch)
        return (first + int(self._sample_order(epoch)[sample - first])) * self._seq_length

    def _read(self, start: int, num: int) -> NDArray[np.int64]:
        """``num`` tokens of the joined text from token ``start`` on, over documents and epochs."""
        pieces = []
        while num:
            epoch, place = divmod(start, self._num_tokens)
            order, ends = self._document_order(epoch)
            index = int(np.searchsorted(ends, place, side="right"))
            document = int(order[index])
            inside = place - int(ends[index]) + int(self._lengths[document])
            piece = self._files.read(document, inside, inside + num)
            pieces.append(piece.astype(np.int64))
            start, num = start + len(piece), num - len(piece)
        return np.concatenate(pieces)

    def _first_sample(self, epoch: int) -> int:
        """The first sample that starts in an epoch."""
        return -(-epoch * self._num_tokens // self._seq_length)

    def _shuffle_documents(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The documents of an epoch in order, and where each ends in its text."""
        order = keyed_permutation(len(self._lengths), self._seed, _DOCUMENTS, epoch)
        return order, np.cumsum(self._lengths[order])

    def _shuffle_samples(self, epoch: int) -> NDArray[np.int64]:
        num_samples = self._first_sample(epoch + 1) - self._first_sample(epoch)
        return keyed_permutation(num_samples, self._seed, _SAMPLES, epoch)


def train_documents(num_documents: int, split: tuple[str, ...]) -> int:
    """How many documents, from the first on, are for training.

    Args:
        num_documents: of the whole file.
        split: weights of training, validation and test as decimal text.
    Returns:
        Their share by the first weight, rounded to the nearest, half to even as Megatron-LM does.
    """
    weights = [Fraction(weight) for weight in split]
    return round(num_documents * weights[0] / sum(weights))
