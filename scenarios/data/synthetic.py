"""The corpus made on the spot: text of a sparse Markov chain, by integer arithmetic alone.

A model can learn it in two stages, so that the loss falls early and keeps falling: some tokens are
far more frequent than others (rank r about as 1/r), and after each token four tokens follow 7 times
in 8.
"""

import numpy as np
from numpy.typing import NDArray

from scenarios.data.keyed_hash import keyed_hash

_SUCCESSOR, _DRAW = 1, 2
_SPREAD = np.uint64(2654435761)
"""A prime above every vocabulary: frequent tokens spread over all parts of it."""
_CHOICE = np.array([0, 0, 0, 0, 1, 1, 2, 3])
"""Of the four successors the first follows 4 times in 8, the second 2 times, the others once."""


class MarkovCorpus:
    """Samples of the chain that a seed defines; sample k depends on (seed, k) alone."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._seq_length = seq_length
        self._seed = seed
        tokens = np.arange(vocab_size, dtype=np.uint64)[:, None]
        choices = np.arange(4, dtype=np.uint64)[None, :]
        self._successors = self._frequent(keyed_hash(seed, _SUCCESSOR, tokens, choices))  # [V, 4]

    def samples(self, first_sample: int, num: int) -> NDArray[np.int64]:
        """Token ids of consecutive samples.

        Args:
            first_sample: number of the first one.
            num: how many.
        Returns:
            int64 [num, seq_length + 1].
        """
        numbers = np.arange(num, dtype=np.uint64)[:, None] + np.uint64(first_sample)
        places = np.arange(self._seq_length + 1, dtype=np.uint64)[None, :]
        bits = keyed_hash(self._seed, _DRAW, numbers, places)  # [num, seq_length + 1]
        fresh = bits & np.uint64(7) == 0
        choice = _CHOICE[bits >> np.uint64(3) & np.uint64(7)]
        sequences = self._frequent(keyed_hash(bits))
        for place in range(1, self._seq_length + 1):
            following = self._successors[sequences[:, place - 1], choice[:, place]]
            sequences[:, place] = np.where(fresh[:, place], sequences[:, place], following)
        return sequences

    def _frequent(self, bits: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Tokens by random bits: a uniform number of binary digits, then uniform digits."""
        levels = np.uint64(self._vocab_size.bit_length())
        size = np.uint64(1) << (bits >> np.uint64(32)) % levels
        rank = (size - np.uint64(1) + (bits & (size - np.uint64(1)))) % np.uint64(self._vocab_size)
        return (rank * _SPREAD % np.uint64(self._vocab_size)).astype(np.int64)
