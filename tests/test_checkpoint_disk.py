"""A checkpoint on a bad disk: flipped bytes, no space, no right to write, errors of the device."""

import errno
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import small_tmpfs
from thread_ranks import on_ranks

from primitives.checkpoint import CheckpointManager, shard_file
from primitives.checkpoint.chunks import collect
from primitives.checkpoint.exchange import Exchange
from primitives.checkpoint.folder import CheckpointRoot
from primitives.checkpoint.writer import save_state
from primitives.errors import CheckpointCorrupt, CheckpointSaveFailed

NUM_RANKS = 4
NUM_FLIPS = 500


def content(step: int, numel: int) -> dict[str, torch.Tensor]:
    return {f"w{rank}": torch.arange(numel) * step + rank for rank in range(NUM_RANKS)}


def save(root: Path, step: int, numel: int) -> list[Any]:
    """Saves with NUM_RANKS ranks; what each raised."""

    def body(exchange: Exchange) -> None:
        own = f"w{exchange.rank}"
        local = collect({own: content(step, numel)[own]})
        save_state(CheckpointRoot(root), step, lambda: local, exchange, None)

    return on_ranks(NUM_RANKS, body)


def loads(root: Path, numel: int) -> int:
    """The step of the newest checkpoint, every element of which is right."""
    state = content(0, numel)
    step = CheckpointManager(root).load(state)
    for name, tensor in content(step, numel).items():
        assert torch.equal(state[name], tensor)
    return step


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    assert save(tmp_path, 1, 300) == [None] * NUM_RANKS
    files = sorted((tmp_path / "iter_0000001").iterdir())
    sizes = [path.stat().st_size for path in files]
    draw = random.Random(0)
    state = content(-1, 300)
    hit = set()
    for _ in range(NUM_FLIPS):
        position = draw.randrange(sum(sizes))
        number = 0
        while position >= sizes[number]:
            position -= sizes[number]
            number += 1
        with open(files[number], "r+b") as file:
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ draw.randrange(1, 256)]))
            file.flush()
            with pytest.raises(CheckpointCorrupt, match=f"{files[number].name}: "):
                CheckpointManager(tmp_path).load(state)
            file.seek(position)
            file.write(bytes([byte]))
        hit.add(number)
    assert hit == set(range(len(files)))
    assert all(torch.equal(state[name], tensor) for name, tensor in content(-1, 300).items())
    assert loads(tmp_path, 300) == 1


def refused(root: Path, code: int, numel: int) -> None:
    """Every rank is told soon, and the checkpoint of step 1 stays."""
    started = time.monotonic()
    errors = save(root, 2, numel)
    assert time.monotonic() - started < 10
    for error in errors:
        assert isinstance(error, CheckpointSaveFailed), error
        assert os.strerror(code) in str(error)
        assert str(root) in str(error)
    assert loads(root, 300) == 1


def test_no_space_left(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, "256k") as folder:
        root = Path(folder)
        assert save(root, 1, 300) == [None] * NUM_RANKS
        refused(root, errno.ENOSPC, 20_000)
        assert not list(root.glob(".iter*"))
        assert save(root, 3, 300) == [None] * NUM_RANKS  # training goes on
        assert loads(root, 300) == 3


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A checkpoint root that nobody may write to: root asks for no permission, a mount does."""
    if os.geteuid() == 0:
        with small_tmpfs(folder, "1m") as mounted:
            assert save(Path(mounted), 1, 300) == [None] * NUM_RANKS
            assert os.system(f"mount -o remount,ro {mounted}") == 0
            yield Path(mounted)
    else:
        assert save(folder, 1, 300) == [None] * NUM_RANKS
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(0o755)


def test_read_only(tmp_path: Path) -> None:
    with read_only(tmp_path) as root:
        refused(root, errno.EROFS if os.geteuid() == 0 else errno.EACCES, 300)


class FailingFile:
    """A file on a device that fails after some bytes."""

    def __init__(self, file: Any, nbytes: int) -> None:
        self._file = file
        self._left = nbytes

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        number: int = self._file.fileno()
        return number

    def write(self, content: memoryview) -> int:
        if self._left < len(content):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._left -= len(content)
        written: int = self._file.write(content)
        return written


@pytest.mark.parametrize("name", ["shard_00002.safetensors", "index.json", "manifest.json"])
def test_write_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert save(tmp_path, 1, 300) == [None] * NUM_RANKS

    def failing(path: Path, mode: str, **more: Any) -> Any:
        file = open(path, mode, **more)  # noqa: SIM115
        return FailingFile(file, 100) if (path.name, mode) == (name, "xb") else file

    with monkeypatch.context() as patch:
        patch.setattr(shard_file, "open", failing, raising=False)
        refused(tmp_path, errno.EIO, 300)
    assert save(tmp_path, 2, 300) == [None] * NUM_RANKS
    assert loads(tmp_path, 300) == 2
