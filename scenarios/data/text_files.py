"""Documents in text files: paragraphs of a .txt, the ``text`` fields of a .jsonl."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path


def read_documents(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    """Read a file document by document, holding one at a time.

    Args:
        path: ``.jsonl`` has one JSON object with a ``text`` on each line, as Megatron-LM's
            preprocess_data takes it; in any other file blank lines separate documents.
        advance: called with the bytes of every line read.
    Yields:
        Documents that are not empty.
    Raises:
        ValueError: the file cannot be read, is not UTF-8, or a line is not such an object.
    """
    try:
        with path.open("rb") as file:
            lines = _lines(path, file, advance)
            yield from _json_texts(path, lines) if path.suffix == ".jsonl" else _paragraphs(lines)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: Path, file: Iterator[bytes], advance: Callable[[int], None]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} line {number}: got bytes that are not UTF-8 at column {error.start + 1}"
            ) from None
        advance(len(line))


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph.clear()
    if paragraph:
        yield "".join(paragraph)


def _json_texts(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number}: not JSON: {error}") from None
        text = item.get("text") if isinstance(item, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f"{path} line {number}: got {line.strip()[:40]!r}, expected an object with a 'text'"
            )
        if text.strip():
            yield text
