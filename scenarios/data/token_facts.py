"""PREFIX.json: what token files were made with, and the checksums they are verified by."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenFacts:
    """The content of PREFIX.json."""

    tokenizer: str
    vocab_size: int
    """Ids are below it; a model pads it to a multiple of 8."""
    eod: int
    """Id at the end of every document."""
    num_documents: int
    num_tokens: int
    sha256_bin: str = ""
    sha256_idx: str = ""


def read_facts(path: Path) -> TokenFacts | None:
    """The facts beside token files, None if there are none.

    Raises:
        ValueError: the file cannot be read or is no such file.
    """
    try:
        facts = TokenFacts(**json.loads(path.read_bytes()))
        if not (isinstance(facts.vocab_size, int) and facts.vocab_size > 0):
            raise ValueError(f"got vocab_size {facts.vocab_size!r}, expected a positive integer")
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: corrupt: {error}") from None
    return facts


def check_digest(path: Path, content: NDArray[np.uint8], expected: str) -> None:
    """Compare a file's content with its checksum.

    Raises:
        ValueError: they differ; the message names the file.
    """
    got = hashlib.sha256(content.data).hexdigest()
    if got != expected:
        raise ValueError(f"{path}: corrupt: got SHA-256 {got}, expected {expected}")
