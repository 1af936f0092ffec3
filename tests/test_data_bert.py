"""BERT's samples: what holds in every one, the rates of the draws, and words kept whole."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarios.data import BertBatch, BertDataset, make_dataset
from scenarios.data.bert import (
    BertSample,
    SpecialTokens,
    Tokens,
    WordPieces,
    byte_pieces,
    make_sample,
    synthetic_pieces,
    token_words,
)
from scenarios.data.indexed import IndexedDatasetWriter
from scenarios.data.synthetic import MarkovCorpus
from tests.engine_scenarios import tiny_scenario

SEED = 1234
VOCAB_SIZE = 256
PIECES = [synthetic_pieces, token_words, byte_pieces]


def check_sample(sample: BertSample, text: Tokens, continues: WordPieces) -> None:
    """Everything that holds whatever the draws were."""
    special = SpecialTokens.of(VOCAB_SIZE)
    length, labels, types = sample.length, sample.labels, sample.token_types
    size = len(text) + 3
    assert len(labels) == len(sample.tokens) == len(types) == len(sample.loss_mask) == size
    assert 5 <= length <= size
    separators = np.flatnonzero(labels == special.sep).tolist()
    assert labels[0] == special.cls
    assert (len(separators), separators[-1]) == (2, length - 1)
    assert (labels[length:] == special.pad).all()
    assert (sample.tokens[length:] == special.pad).all()
    middle = separators[0]
    assert types.tolist() == [0] * (middle + 1) + [1] * (length - middle - 1) + [0] * (
        size - length
    )
    halves = [labels[1:middle], labels[middle + 1 : length - 1]]
    if sample.swapped:
        halves.reverse()
    assert np.concatenate(halves).tolist() == text[: length - 3].tolist()

    masked = np.flatnonzero(sample.loss_mask)
    budget = max(1, (15 * length + 50) // 100)
    assert len(masked) >= 1
    assert len(masked) <= budget or len(masked) == run_of_one_word(sample, continues)
    assert not {0, middle, length - 1} & set(masked.tolist())
    assert (sample.tokens == labels)[~sample.loss_mask].all()
    assert special.mask not in labels
    for first, end in ((1, middle), (middle + 1, length - 1)):
        starts = ~continues(labels[first:end])
        inside = sample.loss_mask[first:end]
        assert (starts[1:] | (inside[1:] == inside[:-1])).all(), "words are masked whole"


def run_of_one_word(sample: BertSample, continues: WordPieces) -> int:
    """The tokens masked, if they are one word and nothing else; otherwise 0."""
    masked = np.flatnonzero(sample.loss_mask)
    run = sample.labels[masked[0] : masked[-1] + 1]
    return len(run) if len(run) == len(masked) and continues(run)[1:].all() else 0


@given(
    st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(2, 80), st.sampled_from(PIECES)
)
@settings(max_examples=200, deadline=None)
def test_every_sample(seed: int, number: int, length: int, continues: WordPieces) -> None:
    generator = np.random.default_rng(number)
    text = generator.integers(0, VOCAB_SIZE - 4, length)
    check_sample(make_sample(text, number, seed, VOCAB_SIZE, continues), text, continues)


def samples(num: int) -> list[tuple[BertSample, Tokens]]:
    """Samples of 60 tokens of text."""
    texts = MarkovCorpus(VOCAB_SIZE - 4, 59, SEED).samples(0, num)
    return [
        (make_sample(text, i, SEED, VOCAB_SIZE, synthetic_pieces), text)
        for i, text in enumerate(texts)
    ]


BREAKAGES: dict[str, Callable[[BertSample], None]] = {
    "a piece of a word unmasked": lambda s: s.loss_mask.__setitem__(
        int(np.flatnonzero(s.loss_mask)[0]), False
    ),
    "a special token masked": lambda s: s.loss_mask.__setitem__(0, True),
    "a padded token": lambda s: s.tokens.__setitem__(slice(s.length, None), 0),
    "another type": lambda s: s.token_types.__setitem__(0, 1),
    "the order of the text": lambda s: s.labels.__setitem__(slice(1, 3), s.labels[2:0:-1].copy()),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_check_sees_a_broken_sample(breakage: str) -> None:
    caught = 0
    for sample, text in samples(100):
        BREAKAGES[breakage](sample)
        try:
            check_sample(sample, text, synthetic_pieces)
        except AssertionError:
            caught += 1
    assert caught > 10


def test_rates_of_the_draws() -> None:
    special = SpecialTokens.of(VOCAB_SIZE)
    drawn = [sample for sample, _ in samples(2000)]
    tokens = np.concatenate([sample.tokens[sample.loss_mask] for sample in drawn])
    labels = np.concatenate([sample.labels[sample.loss_mask] for sample in drawn])
    assert np.mean([sample.swapped for sample in drawn]) == pytest.approx(0.5, abs=0.03)
    assert len(tokens) / sum(sample.length for sample in drawn) == pytest.approx(0.15, abs=0.005)
    assert np.mean(tokens == special.mask) == pytest.approx(0.8, abs=0.02)
    assert np.mean(tokens == labels) == pytest.approx(0.1, abs=0.02)
    assert np.mean([sample.length < 50 for sample in drawn]) == pytest.approx(0.08, abs=0.02)
    assert np.mean([sample.length == 63 for sample in drawn]) < 0.2, "most samples have padding"
    grams = [
        len(run)
        for sample in drawn
        for run in np.split(
            np.flatnonzero(sample.loss_mask),
            np.flatnonzero(np.diff(np.flatnonzero(sample.loss_mask)) > 1) + 1,
        )
    ]
    assert max(grams) > 3, "an n-gram of words has several pieces"
    assert 0.3 < np.mean(np.array(grams) == 1) < 0.7


def test_batches_do_not_depend_on_how_they_are_asked_for() -> None:
    scenario = tiny_scenario(1, family="bert")
    dataset = make_dataset(scenario)
    assert isinstance(dataset, BertDataset)
    together = dataset.batch(5, 4)
    for i in reversed(range(4)):
        alone = make_dataset(scenario).batch(5 + i, 1)
        assert isinstance(alone, BertBatch)
        for field in ("tokens", "labels", "token_types", "loss_mask", "lengths", "swapped"):
            assert torch.equal(getattr(alone, field)[0], getattr(together, field)[i]), field
    assert together.sample_index.tolist() == [5, 6, 7, 8]
    assert together.tokens.dtype == together.lengths.dtype == together.swapped.dtype == torch.int64
    assert together.loss_mask.dtype == torch.bool
    with pytest.raises(ValueError, match="first_sample -1"):
        dataset.batch(-1, 1)


def test_samples_are_the_ones_the_golden_was_recorded_on() -> None:
    corpus = MarkovCorpus(1020, 60, SEED)
    batch = BertDataset(corpus, 1024, SEED, synthetic_pieces).batch(0, 1)
    assert batch.tokens[0, :8].tolist() == [1020, 950, 12, 29, 676, 221, 0, 84]
    assert batch.loss_mask[0].nonzero().flatten().tolist() == [23, 24, 36, 37, 38, 46, 47, 48, 61]
    assert (int(batch.lengths[0]), int(batch.swapped[0])) == (63, 0)


def test_words_of_bytes() -> None:
    text = np.frombuffer("It's 20 °C, d'accord".encode(), np.uint8).astype(np.int64)
    starts = np.flatnonzero(~byte_pieces(text)).tolist()
    words = [bytes(text[a:b].tolist()).decode() for a, b in pairwise([*starts, len(text)])]
    assert [word for word in words if word != " "] == [
        "It",
        "'",
        "s",
        "20",
        "°C",
        ",",
        "d",
        "'",
        "accord",
    ]


def test_token_files(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document(list(range(60)) * 9)
    scenario = tiny_scenario(1, family="bert")
    data = scenario.data.model_copy(update={"prefix": tmp_path / "p"})
    batch = make_dataset(scenario.model_copy(update={"data": data})).batch(0, 8)
    assert isinstance(batch, BertBatch)
    special = SpecialTokens.of(scenario.model.vocab_size)
    assert (batch.labels[:, 0] == special.cls).all()
    following = (batch.labels[:, 2] - batch.labels[:, 1]) % 60
    assert ((following == 1) | (batch.labels[:, 2] == special.sep)).all()
