"""One safetensors file: written with its digest computed on the way, and read back in boxes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Safetensors' names of the dtypes we store.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BLOCK_NBYTES = 1 << 22  # fits the last-level cache: hashed and written while still warm


class FileRecord(NamedTuple):
    """What the manifest says about one file."""

    nbytes: int
    sha256: str


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a dense tensor of any device as host bytes, in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def blocks(content: memoryview) -> Iterator[memoryview]:
    """``content`` in pieces of BLOCK_NBYTES."""
    for start in range(0, len(content), BLOCK_NBYTES):
        yield content[start : start + BLOCK_NBYTES]


def write_file(path: Path, parts: Iterator[memoryview]) -> FileRecord:
    """Writes a new file, flushed to the disk.

    Raises:
        FileExistsError: the file is already there.
        OSError: the file system refuses; ``filename`` is set.
    """
    digest, nbytes = hashlib.sha256(), 0
    try:
        with open(path, "xb", buffering=0) as file:
            for part in parts:
                digest.update(part)
                written = 0
                while written < len(part):  # an unbuffered write may be short
                    written += file.write(part[written:])
                # Lets the disk begin with this part while the next one is hashed.
                os.posix_fadvise(file.fileno(), nbytes, len(part), os.POSIX_FADV_DONTNEED)
                nbytes += len(part)
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return FileRecord(nbytes, digest.hexdigest())


class Layout(NamedTuple):
    """One tensor of a file that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> FileRecord:
    """Writes named tensors in the safetensors format: no second copy in memory.

    Args:
        path: a file that does not exist yet.
        tensors: name -> dense tensor, any shape, dtype in DTYPE_NAMES, any device.

    Returns:
        Size and SHA-256 of the file.
    """
    layouts = {name: Layout(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return stream_tensors(path, layouts, tensors.__getitem__)


def stream_tensors(
    path: Path,
    layouts: dict[str, Layout],
    get: Callable[[str], torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> FileRecord:
    """Writes tensors, asking for one at a time, in the safetensors format.

    Args:
        path: a file that does not exist yet.
        layouts: name -> what the tensor will be.
        get: makes a tensor when it is its turn.
        metadata: text that safetensors keeps beside the tensors.

    Returns:
        Size and SHA-256 of the file.

    Source: https://github.com/huggingface/safetensors#format
    """
    # Widest elements first keeps every tensor aligned; names make the bytes reproducible.
    order = sorted(layouts, key=lambda name: (-layouts[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape = layouts[name]
        end = offset + layouts[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[memoryview]:
        yield memoryview(len(text).to_bytes(8, "little") + text)
        for name in order:
            yield from blocks(tensor_bytes(get(name)))

    return write_file(path, parts())


def file_record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file as it is on the disk now."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(file.tell(), digest.hexdigest())


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's elements."""
    digest = hashlib.sha256()
    for block in blocks(tensor_bytes(tensor)):
        digest.update(block)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Makes the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
