"""BERT's samples: two segments of text, perhaps swapped, padded, with whole words masked.

A sample is a function of (seed, its number, its text), in integers alone, so it is the same on
every machine and in every layout.
Source: megatron.core.datasets.bert_dataset and masked_dataset have the same steps, with draws of
numpy's generator and with sentences where here the text is cut anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from scenarios.data.batch import Batch, Dataset, SampleSource
from scenarios.data.keyed_hash import keyed_hash, keyed_permutation

Tokens = NDArray[np.int64]
WordPieces = Callable[[Tokens], NDArray[np.bool_]]
"""Which tokens of a text continue the word of the token before: bool like the tokens."""

NUM_SPECIAL_TOKENS = 4
NUM_EDGES = 3
"""[CLS] and two [SEP]."""
MAX_NGRAM = 3
_SHAPE, _ORDER, _NGRAM, _REPLACE, _PIECE = 10, 11, 12, 13, 14


class SpecialTokens(NamedTuple):
    """The last four ids of a vocabulary; no text holds them."""

    cls: int
    sep: int
    mask: int
    pad: int

    @classmethod
    def of(cls, vocab_size: int) -> Self:
        """The special tokens of a vocabulary of this size."""
        return cls(*range(vocab_size - NUM_SPECIAL_TOKENS, vocab_size))


@dataclass(frozen=True)
class BertBatch(Batch):
    """Consecutive samples; ``labels`` are the tokens before any was masked."""

    token_types: torch.Tensor
    """[b, s] int64: 1 in the second segment and its [SEP], else 0."""
    loss_mask: torch.Tensor
    """[b, s] bool: the tokens to predict, at least one per sample."""
    lengths: torch.Tensor
    """[b] int64: tokens before the padding."""
    swapped: torch.Tensor
    """[b] int64: 1 where the second segment stood before the first in the text."""


@dataclass(frozen=True)
class BertSample:
    """One sample, [s] each."""

    tokens: Tokens
    labels: Tokens
    token_types: Tokens
    loss_mask: NDArray[np.bool_]
    length: int
    swapped: int


class BertDataset(Dataset):
    """BERT samples made from texts of ``seq_length - 3`` tokens."""

    def __init__(
        self, source: SampleSource, vocab_size: int, seed: int, continues: WordPieces
    ) -> None:
        """
        Args:
            source: texts by number; their ids leave the last four of the vocabulary free.
            vocab_size: of the model.
            seed: of all draws.
            continues: tells words from their pieces.
        """
        super().__init__(source)
        self._vocab_size = vocab_size
        self._seed = seed
        self._continues = continues

    def batch(self, first_sample: int, num: int) -> BertBatch:
        """Read consecutive samples; arguments and errors as of ``Dataset.batch``."""
        samples = [
            make_sample(text, first_sample + i, self._seed, self._vocab_size, self._continues)
            for i, text in enumerate(self.sequences(first_sample, num))
        ]

        def stacked(field: str) -> torch.Tensor:
            return torch.from_numpy(np.stack([getattr(sample, field) for sample in samples]))

        return BertBatch(
            tokens=stacked("tokens"),
            labels=stacked("labels"),
            sample_index=torch.arange(first_sample, first_sample + num),
            token_types=stacked("token_types"),
            loss_mask=stacked("loss_mask"),
            lengths=torch.tensor([sample.length for sample in samples]),
            swapped=torch.tensor([sample.swapped for sample in samples]),
        )


def make_sample(
    text: Tokens, number: int, seed: int, vocab_size: int, continues: WordPieces
) -> BertSample:
    """One sample: [CLS] A [SEP] B [SEP] and padding up to ``len(text) + 3`` tokens.

    Args:
        text: [s - 3] int64, at least 2 tokens, ids below vocab_size - 4.
        number: of the sample; all draws are keyed by it and the seed.
        seed: see there.
        vocab_size: the special tokens are its last four.
        continues: tells words from their pieces.
    Returns:
        The sample. One text in ten is shortened to any length of at least 2, the others by up to
        an eighth; it is cut in two anywhere, and the halves are swapped with probability 1/2.
    """
    special = SpecialTokens.of(vocab_size)
    draws = keyed_hash(seed, _SHAPE, number, np.arange(4, dtype=np.uint64)).tolist()
    room = len(text)
    if draws[0] % 10 == 0:
        num_kept = 2 + draws[1] % (room - 1)
    else:
        num_kept = room - draws[1] % (room // 8 + 1)
    cut = 1 + draws[2] % (num_kept - 1)
    swapped = draws[3] % 2
    segments = [text[:cut], text[cut:num_kept]]
    if swapped:
        segments.reverse()

    length = num_kept + NUM_EDGES
    labels = np.full(room + NUM_EDGES, special.pad, np.int64)
    labels[0], labels[length - 1] = special.cls, special.sep
    token_types = np.zeros_like(labels)
    words: list[list[range]] = []
    start = 1
    for segment in segments:
        end = start + len(segment)
        labels[start:end], labels[end] = segment, special.sep
        words.append(_words(start, continues(segment)))
        start = end + 1
    token_types[1 + len(segments[0]) + 1 : length] = 1

    masked = _choose_masked(words, max(1, (15 * length + 50) // 100), number, seed)
    loss_mask = np.zeros(len(labels), np.bool_)
    loss_mask[masked] = True
    places = np.arange(len(labels), dtype=np.uint64)
    bits = keyed_hash(seed, _REPLACE, number, places)
    fate = bits % np.uint64(10)  # 0 to 7: [MASK]; 8: stays; 9: any token of a text
    any_token = (bits >> np.uint64(32)) % np.uint64(vocab_size - NUM_SPECIAL_TOKENS)
    replaced = np.where(fate < 8, special.mask, np.where(fate == 8, labels, any_token))
    tokens = np.where(loss_mask, replaced, labels).astype(np.int64)
    return BertSample(tokens, labels, token_types, loss_mask, length, swapped)


def _words(start: int, continues: NDArray[np.bool_]) -> list[range]:
    """The words of a segment that begins at ``start``, as runs of positions."""
    first = np.flatnonzero(~continues[1:]) + 1
    edges = [0, *first.tolist(), len(continues)]
    return [range(start + a, start + b) for a, b in pairwise(edges)]


def _choose_masked(words: list[list[range]], budget: int, number: int, seed: int) -> list[int]:
    """Positions of n-grams of whole words, at most ``budget`` tokens (but at least one word).

    Words are visited in a shuffled order. An n-gram starts at the word and stays in its segment;
    n is 1, 2 or 3 with weights 6:3:2, less when the budget is nearly used up.
    """
    candidates = [(segment, i) for segment in words for i in range(len(segment))]
    order = keyed_permutation(len(candidates), seed, _ORDER, number)
    weights = keyed_hash(seed, _NGRAM, number, np.arange(len(order), dtype=np.uint64))
    masked: set[int] = set()
    for place, draw in zip(order.tolist(), (weights % np.uint64(11)).tolist(), strict=True):
        segment, i = candidates[place]
        n = 1 if draw < 6 else 2 if draw < 9 else MAX_NGRAM
        ngram = segment[i : i + n]
        while ngram and len(masked) + sum(map(len, ngram)) > budget:
            ngram = ngram[:-1]
        positions = {position for word in ngram for position in word}
        if positions.isdisjoint(masked):
            masked |= positions
        if len(masked) == budget:
            break
    if not masked:
        segment, i = candidates[int(order[0])]
        masked.update(segment[i])
    return sorted(masked)


def synthetic_pieces(tokens: Tokens) -> NDArray[np.bool_]:
    """In the corpus made on the spot one id in four continues a word."""
    inside: NDArray[np.bool_] = keyed_hash(_PIECE, tokens.astype(np.uint64)) % np.uint64(4) == 0
    return inside


def byte_pieces(tokens: Tokens) -> NDArray[np.bool_]:
    """In text stored as bytes a word is a run of ASCII letters, digits and bytes above 127."""
    lower = tokens | 0x20
    digit = (tokens >= ord("0")) & (tokens <= ord("9"))
    letter = (lower >= ord("a")) & (lower <= ord("z")) & (tokens < 128)
    inside = letter | digit | ((tokens > 127) & (tokens < 256))
    inside[1:] &= inside[:-1].copy()
    inside[:1] = False
    return inside


def token_words(tokens: Tokens) -> NDArray[np.bool_]:
    """Where pieces cannot be told, every token is a word, as in Megatron-LM without ``##``."""
    return np.zeros(tokens.shape, np.bool_)
