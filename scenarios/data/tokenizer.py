"""Text to token ids: bytes, or a tokenizer.json of the ``tokenizers`` library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOD>", "[SEP]")
"""Tokens that end a document, by preference; a tokenizer without any gets one more id."""


class Tokenizer(Protocol):
    """What building token files needs."""

    name: str
    vocab_size: int
    """Ids are below it."""
    eod: int
    """Id appended to every document."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; what is no text becomes U+FFFD, an unknown id nothing."""


class ByteTokenizer:
    """The UTF-8 bytes of the text, and 256 as the end of a document."""

    name = "bytes"
    vocab_size = 257
    eod = 256

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json."""

    def __init__(self, path: Path) -> None:
        """Load the file.

        Raises:
            ValueError: the file is missing or no tokenizer.
        """
        # Only this tokenizer needs the library, which takes a moment to import.
        from tokenizers import Tokenizer as Library

        if not path.is_file():
            raise ValueError(
                f"tokenizer {path}: no such file; expected 'bytes' or a tokenizer.json"
            )
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer {path}: not a tokenizer.json: {error}") from None
        self.name = path.name
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"tokenizer {path}: got an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        ends = [vocabulary[token] for token in END_OF_TEXT if token in vocabulary]
        self.eod = ends[0] if ends else self.vocab_size
        self.vocab_size = max(self.vocab_size, self.eod + 1)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, with special tokens by their names."""
        return str(self._library.decode(list(ids), skip_special_tokens=False))


def load_tokenizer(name: str) -> Tokenizer:
    """``bytes`` or the path of a tokenizer.json.

    Raises:
        ValueError: the file is missing or no tokenizer.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name))
