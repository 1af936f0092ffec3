"""Training samples are pure functions of their number, made on the spot or read from files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scenarios.data import make_dataset
from scenarios.data.documents import DocumentStream, train_documents
from scenarios.data.indexed import IndexedDataset, IndexedDatasetWriter
from scenarios.data.keyed_hash import keyed_hash, keyed_permutation
from scenarios.data.synthetic import MarkovCorpus
from scenarios.schema import load_scenario

SEEDS = st.integers(0, 2**63 - 1)


def write_documents(prefix: Path, documents: list[list[int]]) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


def splitmix(state: int) -> int:
    """Reference in Python integers."""
    mask = 2**64 - 1
    state = state + 0x9E3779B97F4A7C15 & mask
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
    return state ^ state >> 31


def test_hash_is_splitmix64() -> None:
    # First outputs of the published generator from state 1234567.
    assert splitmix(1234567) == 6457827717110365317
    assert keyed_hash(1234567)[0] == 6457827717110365317


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_hash_equals_the_reference(words: list[int]) -> None:
    state = 0
    for word in words:
        state = splitmix(state ^ word)
    assert int(keyed_hash(*words)[0]) == state
    assert int(keyed_hash(*words[:-1], np.array([7, words[-1]], dtype=np.uint64))[1]) == state


@given(SEEDS, st.integers(0, 300))
def test_permutation(seed: int, length: int) -> None:
    order = keyed_permutation(length, seed)
    assert sorted(order.tolist()) == list(range(length))
    assert order.tolist() == keyed_permutation(length, seed).tolist()
    if length > 20:
        assert order.tolist() != keyed_permutation(length, seed ^ 1).tolist()


@given(SEEDS, st.integers(8, 3000), st.integers(1, 40), st.integers(0, 2**40), st.integers(1, 9))
@settings(max_examples=40)
def test_synthetic_samples_do_not_depend_on_how_they_are_asked_for(
    seed: int, vocab_size: int, seq_length: int, first: int, num: int
) -> None:
    corpus = MarkovCorpus(vocab_size, seq_length, seed)
    together = corpus.samples(first, num)
    assert together.shape == (num, seq_length + 1)
    assert 0 <= together.min() <= together.max() < vocab_size
    again = MarkovCorpus(vocab_size, seq_length, seed)
    for i in reversed(range(num)):
        assert np.array_equal(again.samples(first + i, 1)[0], together[i])


def test_synthetic_corpus_is_the_one_the_goldens_were_recorded_on() -> None:
    tokens = MarkovCorpus(1024, 64, 1234).samples(0, 2)
    assert tokens[0, :8].tolist() == [726, 427, 29, 868, 0, 355, 813, 0]


def entropy(counts: Counter[object]) -> float:
    p = np.array([*counts.values()]) / sum(counts.values())
    return float(-(p * np.log(p)).sum())


def test_synthetic_corpus_can_be_learned() -> None:
    """In nats: below uniform by frequency alone, and much lower by the token before."""
    tokens = MarkovCorpus(256, 64, 1234).samples(0, 4000)
    pairs = Counter(
        zip(tokens[:, :-1].ravel().tolist(), tokens[:, 1:].ravel().tolist(), strict=True)
    )
    by_frequency = entropy(Counter(tokens[:, 1:].ravel().tolist()))
    by_predecessor = entropy(Counter(pairs)) - entropy(Counter(tokens[:, :-1].ravel().tolist()))
    assert by_frequency < 0.85 * np.log(256)
    assert by_predecessor < 0.6 * by_frequency


def test_frequent_tokens_lie_in_every_part_of_the_vocabulary() -> None:
    tokens = MarkovCorpus(1024, 64, 1234).samples(0, 500)
    parts = np.bincount(tokens.ravel() // 128, minlength=8) / tokens.size
    assert parts.min() > 0.02


def test_batch_is_tokens_and_the_next_ones() -> None:
    dataset = make_dataset(load_scenario("S1", scale="ci"))
    batch = dataset.batch(5, 3)
    assert batch.tokens.dtype == batch.labels.dtype == batch.sample_index.dtype == torch.int64
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert not torch.equal(batch.tokens[0], batch.tokens[1])
    assert batch.sample_index.tolist() == [5, 6, 7]
    assert batch.tokens.is_contiguous()
    assert batch.labels.is_contiguous()
    with pytest.raises(ValueError, match="first_sample -1"):
        dataset.batch(-1, 1)
    with pytest.raises(ValueError, match="num 0"):
        dataset.batch(0, 0)


def test_data_leave_torchs_and_numpys_generators_alone() -> None:
    before = torch.random.get_rng_state(), repr(np.random.get_state())
    make_dataset(load_scenario("S1", scale="ci")).batch(0, 4)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == repr(np.random.get_state())


documents = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=8)


@given(documents, st.integers(1, 12), SEEDS, st.integers(0, 60), st.integers(1, 5))
@settings(max_examples=60)
def test_document_samples_do_not_depend_on_how_they_are_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[int]],
    seq_length: int,
    seed: int,
    first: int,
    num: int,
) -> None:
    files = write_documents(tmp_path_factory.mktemp("data") / "p", [*texts, [1]])
    together = DocumentStream(files, 100, seq_length, seed, ("1",)).samples(first, num)
    again = DocumentStream(files, 100, seq_length, seed, ("1",))
    for i in reversed(range(num)):
        assert np.array_equal(again.samples(first + i, 1)[0], together[i])


def joined(files: IndexedDataset, order: NDArray[np.int64]) -> list[int]:
    return [int(token) for document in order for token in files.read(int(document))]


@given(documents, st.integers(1, 12), SEEDS)
@settings(max_examples=60)
def test_every_epoch_is_all_documents_once(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[int]],
    seq_length: int,
    seed: int,
) -> None:
    """Reference: join the shuffled documents of 3 epochs, cut, compare each epoch's samples."""
    files = write_documents(tmp_path_factory.mktemp("data") / "p", [*texts, [1, 2]])
    stream = DocumentStream(files, 100, seq_length, seed, ("1",))
    orders = [keyed_permutation(files.num_documents, seed, 3, epoch) for epoch in range(3)]
    text = [token for order in orders for token in joined(files, order)]
    epoch_length = len(text) // 3
    pieces = [text[i : i + seq_length + 1] for i in range(0, len(text) - seq_length, seq_length)]
    for epoch in range(2):
        inside = [
            i for i in range(len(pieces)) if i * seq_length // epoch_length == epoch
        ]  # samples that start in this epoch
        got = [stream.samples(i, 1)[0].tolist() for i in inside]
        if inside and (inside[-1] + 1) * seq_length + 1 <= len(text):
            assert sorted(got) == sorted(pieces[i] for i in inside)


def test_documents_are_shuffled_anew_in_every_epoch(tmp_path: Path) -> None:
    files = write_documents(tmp_path / "p", [[i] * 4 for i in range(50)])
    stream = DocumentStream(files, 50, 4, 1, ("1",))
    first, second = ([int(row[0]) for row in stream.samples(epoch * 50, 50)] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("num", "split", "expected"),
    [
        (1000, ("949", "50", "1"), 949),
        (7, ("1", "1"), 4),  # 3.5 rounds half to even
        (5, ("0.5", "0.5"), 2),
        (3, ("98", "2"), 3),
        (10, ("1",), 10),
    ],
)
def test_split(num: int, split: tuple[str, ...], expected: int) -> None:
    assert train_documents(num, split) == expected


def test_only_training_documents_are_trained_on(tmp_path: Path) -> None:
    files = write_documents(tmp_path / "p", [[i] * 3 for i in range(10)])
    seen = set(DocumentStream(files, 10, 3, 1, ("6", "4")).samples(0, 40).ravel().tolist())
    assert seen == set(range(6))


def test_data_that_do_not_fit_the_model(tmp_path: Path) -> None:
    files = write_documents(tmp_path / "p", [[1, 2, 300]])
    with pytest.raises(ValueError, match="got token id 300, expected 0 to 255"):
        DocumentStream(files, 256, 2, 1, ("1",)).samples(0, 1)
    with pytest.raises(ValueError, match="0 of 1 documents with 0 tokens"):
        DocumentStream(files, 256, 2, 1, ("1", "9"))
