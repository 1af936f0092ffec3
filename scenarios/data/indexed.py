"""Megatron-LM's token files PREFIX.bin and PREFIX.idx: read, written, and built from text.

PREFIX.json beside them is ours: tokenizer, vocabulary, and the SHA-256 of both files. Files without
it are read too, but then an altered token or a document index moved to another valid place goes
unnoticed.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scenarios.data.index_format import DTYPES, TokenIndex, index_bytes, parse_index
from scenarios.data.text_files import read_documents
from scenarios.data.token_facts import TokenFacts, check_digest, read_facts
from scenarios.data.tokenizer import load_tokenizer

UINT16_VOCABULARY = 65500
"""Megatron-LM stores ids of vocabularies below this size in two bytes, others in four."""
DOCUMENTS_AT_ONCE = 256
TOKENS_AT_ONCE = 1 << 24


class IndexedDataset:
    """Token files opened for reading: the index is checked, the tokens are only mapped."""

    def __init__(self, prefix: Path) -> None:
        """Open PREFIX.idx, PREFIX.bin and, when it is there, PREFIX.json.

        Args:
            prefix: path without the suffix.
        Raises:
            ValueError: a file is missing, truncated or contradicts another; the message names it.
        """
        self.prefix = Path(prefix)
        content, tokens = _map(_file(self.prefix, "idx")), _map(_file(self.prefix, "bin"))
        self._facts = read_facts(_file(self.prefix, "json"))
        try:
            index = parse_index(content, len(tokens))
        except ValueError as error:
            raise ValueError(f"{_file(self.prefix, 'idx')}: corrupt: {error}") from None
        if self._facts is not None:
            check_digest(_file(self.prefix, "idx"), content, self._facts.sha256_idx)
        self._lengths, self._documents = index.lengths, index.documents
        self._tokens: NDArray[np.integer[Any]] = tokens.view(index.dtype)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self._documents) - 1

    @property
    def tokenizer(self) -> str | None:
        """Name of the tokenizer that made the tokens; None when there is no PREFIX.json."""
        return None if self._facts is None else self._facts.tokenizer

    @cached_property
    def document_lengths(self) -> NDArray[np.int64]:
        """[num_documents] tokens of each document."""
        lengths: NDArray[np.int64] = np.diff(self._starts[self._documents])
        return lengths

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below it: the tokenizer's number; without PREFIX.json all tokens are read for it.

        Raises:
            ValueError: a negative token id.
        """
        if self._facts is not None:
            return self._facts.vocab_size
        low, high = 0, 0
        for start in range(0, len(self._tokens), TOKENS_AT_ONCE):
            chunk = self._tokens[start : start + TOKENS_AT_ONCE]
            low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
        if low < 0:
            raise ValueError(f"{_file(self.prefix, 'bin')}: got token id {low}, expected 0 or more")
        return high + 1

    def read(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Tokens of one document.

        Args:
            document: its number.
            start: first token wanted.
            stop: the token after the last one; past the end means the end, like None.
        Returns:
            A read-only view of the file, one-dimensional, in its own integer type.
        """
        first, end = (int(n) for n in self._starts[self._documents[document : document + 2]])
        stop = end if stop is None else min(end, first + stop)
        return self._tokens[first + start : stop]

    def sequence_lengths(self, document: int) -> list[int]:
        """Tokens of each sequence of one document; only data for BERT has more than one."""
        first, end = self._documents[document : document + 2]
        return [int(length) for length in self._lengths[first:end]]

    def verify(self) -> None:
        """Compare the tokens with the checksum in PREFIX.json, when there is one.

        Raises:
            ValueError: the token file was altered.
        """
        if self._facts is not None:
            path = _file(self.prefix, "bin")
            check_digest(path, _map(path), self._facts.sha256_bin)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """[num_sequences + 1] token at which each sequence starts, and the end of the last."""
        return np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])


class IndexedDatasetWriter:
    """Writes token files; they appear, whole, when the ``with`` block ends without an exception."""

    def __init__(self, prefix: Path, dtype: type[np.integer[Any]]) -> None:
        """Start writing beside PREFIX.

        Args:
            prefix: path without the suffix, in a folder that exists.
            dtype: integer type of a token id in the file.
        Raises:
            ValueError: the folder cannot be written to, or the type is none of the format's.
        """
        if dtype not in DTYPES.values():
            names = [np.dtype(known).name for known in DTYPES.values()]
            raise ValueError(f"token type: got {np.dtype(dtype).name}, expected one of {names}")
        self.prefix = Path(prefix)
        self.facts: TokenFacts | None = None
        """Set it inside the block to have PREFIX.json written too."""
        self.num_tokens = 0
        self._dtype = dtype
        self._lengths, self._documents = array("i"), array("q", [0])
        self._digest = hashlib.sha256()
        try:
            self._bin = _staging(self.prefix, "bin").open("wb")
        except OSError as error:
            raise ValueError(f"{prefix}: cannot be written: {error.strerror}") from None

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._documents) - 1

    def add_document(self, tokens: ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: its ids, one-dimensional.
            lengths: tokens of each of its sequences; None means it is one sequence.
        Raises:
            ValueError: an id does not fit the type, or the lengths do not add up.
        """
        wide = np.asarray(tokens, dtype=np.int64)
        narrow = wide.astype(self._dtype)
        if not np.array_equal(wide, narrow):
            raise ValueError(
                f"{self.prefix}: got token ids {wide.min()} to {wide.max()}, "
                f"expected ids that fit {np.dtype(self._dtype)}"
            )
        lengths = [len(wide)] if lengths is None else lengths
        if sum(lengths) != len(wide) or not all(0 <= length < 2**31 for length in lengths):
            raise ValueError(
                f"{self.prefix}: got sequences of {sum(lengths)} tokens in all for a document of "
                f"{len(wide)}, expected equal numbers, and each sequence below 2^31"
            )
        data = narrow.tobytes()
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))
        self.num_tokens += len(wide)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._put_in_place()
        except OSError as failure:
            error = failure
        finally:
            # Closing writes what is still buffered, which fails again on a full disk.
            with suppress(OSError):
                self._bin.close()
            for suffix in ("bin", "json", "idx"):
                _staging(self.prefix, suffix).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ValueError(f"{self.prefix}: cannot be written: {error.strerror}") from None

    def _put_in_place(self) -> None:
        """The old index goes first, the new one comes last: without one nothing is read."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        index = index_bytes(
            TokenIndex(self._dtype, np.asarray(self._lengths), np.asarray(self._documents))
        )
        files = {"idx": index}
        if self.facts is not None:
            self.facts = replace(
                self.facts,
                sha256_bin=self._digest.hexdigest(),
                sha256_idx=hashlib.sha256(index).hexdigest(),
            )
            files["json"] = (json.dumps(asdict(self.facts), indent=2) + "\n").encode()
        for suffix, content in files.items():
            with _staging(self.prefix, suffix).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for suffix in ("idx", "json"):
            _file(self.prefix, suffix).unlink(missing_ok=True)
        for suffix in ("bin", *sorted(files, reverse=True)):
            os.replace(_staging(self.prefix, suffix), _file(self.prefix, suffix))


def build(
    inputs: Iterable[Path],
    tokenizer: str,
    prefix: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> TokenFacts:
    """Make token files from text.

    Args:
        inputs: ``.jsonl`` files with a ``text`` on each line, or text with blank lines between
            documents; one document has to fit in memory.
        tokenizer: ``bytes`` or the path of a tokenizer.json.
        prefix: PREFIX.bin, PREFIX.idx and PREFIX.json appear, whole, at the end.
        progress: called with bytes read and bytes in all.
    Returns:
        What was written.
    Raises:
        ValueError: an input or the tokenizer is missing, unreadable or empty, or PREFIX cannot be
            written; then there are no files.
    """
    paths = [Path(path) for path in inputs]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    encoder = load_tokenizer(tokenizer)
    dtype = np.uint16 if encoder.vocab_size < UINT16_VOCABULARY else np.int32
    total, done = sum(path.stat().st_size for path in paths), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes

    with IndexedDatasetWriter(prefix, dtype) as writer:
        documents = (text for path in paths for text in read_documents(path, advance))
        while texts := list(islice(documents, DOCUMENTS_AT_ONCE)):
            for ids in encoder.encode(texts):
                writer.add_document([*ids, encoder.eod])
            if progress is not None:
                progress(done, total)
        if writer.num_documents == 0:
            raise ValueError(f"{', '.join(map(str, paths)) or 'no input'}: got no text to tokenize")
        writer.facts = TokenFacts(
            tokenizer=encoder.name,
            vocab_size=encoder.vocab_size,
            eod=encoder.eod,
            num_documents=writer.num_documents,
            num_tokens=writer.num_tokens,
        )
    if progress is not None:
        progress(total, total)
    return writer.facts


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")


def _staging(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f".{prefix.name}.{suffix}.{os.getpid()}")


def _map(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, mapped; an empty file cannot be mapped."""
    try:
        if path.stat().st_size == 0:
            return np.empty(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
