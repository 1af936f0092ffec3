"""How a scenario chooses its endless stream of training samples."""

from scenarios.data.batch import Dataset, SampleSource
from scenarios.data.bert import (
    NUM_EDGES,
    NUM_SPECIAL_TOKENS,
    BertDataset,
    WordPieces,
    byte_pieces,
    synthetic_pieces,
    token_words,
)
from scenarios.data.documents import DocumentStream
from scenarios.data.indexed import IndexedDataset
from scenarios.data.synthetic import MarkovCorpus
from scenarios.scenario import Scenario


def make_dataset(scenario: Scenario) -> Dataset:
    """The training data of a scenario.

    Args:
        scenario: its family, seed, sequence length, vocabulary and data prefix are used, its layout
            is not.
    Returns:
        The dataset; for the family bert a ``BertDataset``.
    Raises:
        ValueError: data files that are missing, corrupt or too small.
    """
    model, seed = scenario.model, scenario.training.seed
    if scenario.family == "bert":
        # A source gives one token more than its sequence length.
        text_length = model.seq_length - NUM_EDGES - 1
        source, continues = _source(scenario, model.vocab_size - NUM_SPECIAL_TOKENS, text_length)
        return BertDataset(source, model.vocab_size, seed, continues)
    source, _ = _source(scenario, model.vocab_size, model.seq_length)
    return Dataset(source)


def _source(
    scenario: Scenario, vocab_size: int, seq_length: int
) -> tuple[SampleSource, WordPieces]:
    """Token sequences, and how to tell the words in them."""
    seed = scenario.training.seed
    if scenario.data.prefix is None:
        return MarkovCorpus(vocab_size, seq_length, seed), synthetic_pieces
    files = IndexedDataset(scenario.data.prefix)
    stream = DocumentStream(files, vocab_size, seq_length, seed, scenario.data.split)
    return stream, byte_pieces if files.tokenizer == "bytes" else token_words
