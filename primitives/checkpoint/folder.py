"""The folders of a checkpoint root: staged, committed by one rename, verified, deleted.

[Note: commit] A checkpoint is written to ``.iter_0000010.<random>``; its manifest comes last; one
rename makes it ``iter_0000010``. A kill at any moment leaves either a committed folder or rubbish
whose name starts with a dot, which the next save sweeps. To replace an existing step, the old
folder steps aside to ``.iter_0000010.replaced``; between the two renames readers use that one.
Every file and directory is flushed before the rename that makes it count. The ``latest`` file is
for people and scripts; readers order checkpoints by the generation number in the manifest, so a
torn or outdated ``latest`` changes nothing.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from primitives.checkpoint.plain_values import canonical_json
from primitives.checkpoint.shard_file import (
    FileRecord,
    file_record,
    sync_directory,
    write_file,
)
from primitives.errors import CheckpointCorrupt, CheckpointSaveFailed

FORMAT = "collective-testbed checkpoint 1"
MANIFEST = "manifest.json"
COMMITTED = re.compile(r"iter_(\d{7,})")
REPLACED = re.compile(r"\.iter_(\d{7,})\.replaced")


class Manifest(NamedTuple):
    """What a committed folder consists of."""

    step: int
    generation: int
    """Counts the saves into this root; the highest one is the latest checkpoint."""
    world_size: int
    files: dict[str, FileRecord]


def step_of(folder: Path) -> int:
    """The step that the name of a committed folder tells.

    Raises:
        ValueError: it is not a name that a save commits.
    """
    match = COMMITTED.fullmatch(folder.name) or REPLACED.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder}: not the folder of a checkpoint, expected iter_0000010 or so")
    return int(match[1])


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as JSON with its own digest."""
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "generation": manifest.generation,
        "world_size": manifest.world_size,
        "files": {name: record._asdict() for name, record in manifest.files.items()},
    }
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    return canonical_json(content | {"sha256": digest})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        CheckpointCorrupt: it is missing or not byte for byte what a save wrote.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{path}: missing; {folder} is not a checkpoint") from None
    try:
        content = json.loads(raw)
        if content["format"] != FORMAT:
            raise CheckpointCorrupt(f"{path}: format {content['format']!r}, expected {FORMAT!r}")
        manifest = Manifest(
            content["step"],
            content["generation"],
            content["world_size"],
            {name: FileRecord(**record) for name, record in content["files"].items()},
        )
        intact = manifest_bytes(manifest) == raw
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise CheckpointCorrupt(f"{path}: damaged, it does not match its own digest")
    return manifest


def verify_listing(folder: Path, step: int) -> Manifest:
    """Checks a folder's file names and sizes against its manifest and returns the manifest.

    Raises:
        CheckpointCorrupt: naming the missing, foreign or resized file.
    """
    manifest = read_manifest(folder)
    if manifest.step != step:
        raise CheckpointCorrupt(
            f"{folder / MANIFEST}: belongs to step {manifest.step}, expected step {step}"
        )
    present = {entry.name: entry for entry in os.scandir(folder) if entry.name != MANIFEST}
    for name in sorted(manifest.files.keys() | present.keys()):
        path = folder / name
        if name not in present:
            raise CheckpointCorrupt(f"{path}: missing")
        if name not in manifest.files:
            raise CheckpointCorrupt(f"{path}: not part of this checkpoint")
        if not present[name].is_file(follow_symlinks=False):
            raise CheckpointCorrupt(f"{path}: not a regular file")
        got, expected = present[name].stat().st_size, manifest.files[name].nbytes
        if got != expected:
            raise CheckpointCorrupt(f"{path}: {got} bytes, expected {expected}")
    return manifest


def verify_digest(folder: Path, name: str, expected: FileRecord) -> None:
    """Checks one file's content against the manifest.

    Raises:
        CheckpointCorrupt: naming the file.
    """
    got = file_record(folder / name)
    if got != expected:
        raise CheckpointCorrupt(
            f"{folder / name}: SHA-256 {got.sha256[:16]}.. ({got.nbytes} bytes), "
            f"expected {expected.sha256[:16]}.. ({expected.nbytes} bytes)"
        )


class CheckpointRoot:
    """The folder that holds the checkpoints of one run. Only one rank calls the changing methods.

    Args:
        path: the folder, on a file system that all ranks share; made at the first save.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(
            {
                step_of(Path(name))
                for name in names
                if COMMITTED.fullmatch(name) or REPLACED.fullmatch(name)
            }
        )

    def folder(self, step: int) -> Path:
        """The committed folder of a step, or where it would be."""
        committed = self.path / f"iter_{step:07d}"
        replaced = self._replaced(step)
        return replaced if replaced.exists() and not committed.exists() else committed

    def existing_folder(self, step: int | None) -> Path:
        """The committed folder of a step, or of the latest checkpoint for None.

        Raises:
            FileNotFoundError: there is no such checkpoint.
        """
        chosen = self.latest() if step is None else step
        if chosen is None or not self.folder(chosen).is_dir():
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(f"{self.path}: no {wanted}; have steps {self.steps()}")
        return self.folder(chosen)

    def latest(self) -> int | None:
        """The step saved last; None when there is none.

        Raises:
            CheckpointCorrupt: a manifest cannot be read, so the order is not known.
        """
        found = [(read_manifest(self.folder(step)).generation, step) for step in self.steps()]
        return max(found)[1] if found else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other savers away from this root; a saver that died holds no lock."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointSaveFailed(
                    f"{self.path}: another process is saving into this folder"
                ) from None
            yield

    def stage(self, step: int) -> Path:
        """Sweeps what dead savers left and makes a fresh staging folder. Needs the lock."""
        for path in self.path.glob(".iter_*"):
            match = REPLACED.fullmatch(path.name)
            if match and self.folder(int(match[1])) == path:
                path.rename(self.path / f"iter_{int(match[1]):07d}")
            else:
                shutil.rmtree(path)
        staging = self.path / f".iter_{step:07d}.{secrets.token_hex(8)}"
        staging.mkdir()
        return staging

    def commit(
        self, staging: Path, step: int, world_size: int, files: dict[str, FileRecord]
    ) -> None:
        """Makes a complete staging folder the checkpoint of its step. Needs the lock."""
        generation = max(self._generations().values(), default=0) + 1
        manifest = Manifest(step, generation, world_size, files)
        write_file(staging / MANIFEST, iter([memoryview(manifest_bytes(manifest))]))
        sync_directory(staging)
        final, replaced = self.path / f"iter_{step:07d}", self._replaced(step)
        if final.exists():
            final.rename(replaced)
        try:
            staging.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync_directory(self.path)
        if replaced.exists():
            shutil.rmtree(replaced)
        self._track(step)

    def delete(self, step: int) -> None:
        """Removes a step's checkpoint; a kill midway leaves no half of it. Needs the lock.

        Raises:
            ValueError: there is none.
        """
        folder = self.folder(step)
        if not folder.exists():
            raise ValueError(f"{self.path}: no checkpoint of step {step}; have {self.steps()}")
        rubbish = self.path / f".iter_{step:07d}.{secrets.token_hex(8)}"
        folder.rename(rubbish)
        sync_directory(self.path)
        shutil.rmtree(rubbish)
        left = self._generations()
        if left:
            self._track(max(left, key=left.__getitem__))
        else:
            (self.path / "latest").unlink(missing_ok=True)

    def keep_newest(self, num_kept: int) -> None:
        """Deletes all but the checkpoints saved last; damaged ones are left for a person to see."""
        found = self._generations()
        for step in sorted(found, key=found.__getitem__)[:-num_kept]:
            self.delete(step)

    def _replaced(self, step: int) -> Path:
        return self.path / f".iter_{step:07d}.replaced"

    def _generations(self) -> dict[int, int]:
        """step -> generation; damaged checkpoints, which must not stop a run, are left out."""
        found = {}
        for step in self.steps():
            with suppress(CheckpointCorrupt):
                found[step] = read_manifest(self.folder(step)).generation
        return found

    def _track(self, step: int) -> None:
        temporary = self.path / f".latest.{secrets.token_hex(8)}"
        for left_over in self.path.glob(".latest.*"):
            left_over.unlink()
        write_file(temporary, iter([memoryview(f"{step}\n".encode())]))
        temporary.replace(self.path / "latest")
        sync_directory(self.path)
