"""The bytes of a token index, Megatron-LM's PREFIX.idx, and what must hold in them.

Little-endian: the magic, version 1 (u64), the code of the token type (u8), the number of sequences
(u64), the number of document indices (u64), the length of each sequence in tokens (i32), its byte
offset in PREFIX.bin (i64), and the document indices (i64): document d is the sequences from index d
up to index d + 1, so there is one more of them than documents.
Source: megatron/core/datasets/indexed_dataset.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_NBYTES = 34
DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Megatron-LM's type codes; its 6 and 7 are floats, which are no token ids."""


@dataclass(frozen=True)
class TokenIndex:
    """The content of an index."""

    dtype: type[np.integer[Any]]
    """Of a token id in PREFIX.bin."""
    lengths: NDArray[np.integer[Any]]
    """[num_sequences] tokens of each sequence."""
    documents: NDArray[np.integer[Any]]
    """[num_documents + 1] first sequence of each document, and the number of sequences."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[num_sequences] byte at which each sequence starts."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        return (ends - self.lengths) * np.dtype(self.dtype).itemsize


def index_bytes(index: TokenIndex) -> bytes:
    """The file content of an index."""
    code = next(code for code, dtype in DTYPES.items() if dtype == index.dtype)
    counts = np.array([len(index.lengths), len(index.documents)], dtype="<u8")
    return b"".join(
        [
            MAGIC,
            VERSION.to_bytes(8, "little"),
            code.to_bytes(1, "little"),
            counts.tobytes(),
            index.lengths.astype("<i4").tobytes(),
            index.offsets.astype("<i8").tobytes(),
            index.documents.astype("<i8").tobytes(),
        ]
    )


def parse_index(content: NDArray[np.uint8], bin_nbytes: int) -> TokenIndex:
    """Read and check the file content of an index.

    Args:
        content: [nbytes] the file.
        bin_nbytes: size of the token file it belongs to.
    Returns:
        The index, viewing ``content``.
    Raises:
        ValueError: what does not hold. Offsets must be the running sum of the lengths and end at
            the token file's end, so every altered byte of the header, the lengths and the offsets
            is found, but for a type code of the same width; of the document indices only their
            order is known.
    """
    if len(content) < HEADER_NBYTES:
        raise ValueError(f"got {len(content)} bytes, expected at least {HEADER_NBYTES}")
    header = content[:HEADER_NBYTES].tobytes()
    if header[:9] != MAGIC:
        raise ValueError(f"got first bytes {header[:9]!r}, expected {MAGIC!r}")
    version = int.from_bytes(header[9:17], "little")
    if version != VERSION:
        raise ValueError(f"got version {version}, expected {VERSION}")
    if header[17] not in DTYPES:
        raise ValueError(f"got token type {header[17]}, expected one of {sorted(DTYPES)}")
    num_sequences, num_indices = (int(n) for n in np.frombuffer(header, "<u8", 2, offset=18))
    expected = HEADER_NBYTES + 12 * num_sequences + 8 * num_indices
    if len(content) == expected + num_sequences and num_sequences:
        raise ValueError("got sequence modes, a multimodal index, which is not supported")
    if len(content) != expected:
        raise ValueError(
            f"got {len(content)} bytes, expected {expected} for {num_sequences} sequences "
            f"and {num_indices} document indices"
        )
    arrays = content[HEADER_NBYTES:]
    offsets_at, documents_at = 4 * num_sequences, 12 * num_sequences
    index = TokenIndex(
        dtype=DTYPES[header[17]],
        lengths=arrays[:offsets_at].view("<i4"),
        documents=arrays[documents_at:].view("<i8"),
    )
    _check(index, arrays[offsets_at:documents_at].view("<i8"), bin_nbytes)
    return index


def _check(index: TokenIndex, offsets: NDArray[np.int64], bin_nbytes: int) -> None:
    if (index.lengths < 0).any():
        raise ValueError(f"got a sequence of {index.lengths.min()} tokens, expected 0 or more")
    wrong = np.flatnonzero(index.offsets != offsets)
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"sequence {first} starts at byte {offsets[first]}, expected {index.offsets[first]}, "
            "the sum of the lengths before it"
        )
    nbytes = int(index.lengths.sum(dtype=np.int64)) * np.dtype(index.dtype).itemsize
    if nbytes != bin_nbytes:
        raise ValueError(f"got a token file of {bin_nbytes} bytes, expected {nbytes}")
    documents = index.documents
    if not len(documents) or documents[0] != 0 or documents[-1] != len(index.lengths):
        raise ValueError(f"document indices must go from 0 to {len(index.lengths)}")
    if (np.diff(documents) < 0).any():
        raise ValueError("document indices must not decrease")
