"""Random bits that are a function of a key alone: no generator state, so nothing to save or
resume."""

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def keyed_hash(*words: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash words to 64 bits, over arrays by broadcasting.

    Args:
        words: integers below 2^64 or uint64 arrays that broadcast against each other.
    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.
    Numerics: integers only; the same on every machine.
    Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014), applied word by word.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        # A Python integer above 2^63 must not become a float on the way.
        state = state ^ (np.uint64(word) if isinstance(word, int) else word)
        state = state + _GAMMA
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        state = state ^ (state >> np.uint64(31))
    return state


def keyed_permutation(length: int, *key: int) -> NDArray[np.int64]:
    """A shuffle of ``range(length)`` that depends on the key alone.

    Args:
        length: number of elements.
        key: integers below 2^64.
    Returns:
        int64 array [length].
    """
    words = keyed_hash(*key, np.arange(length, dtype=np.uint64))
    return np.argsort(words, kind="stable").astype(np.int64)
