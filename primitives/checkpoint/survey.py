"""What lies in a folder of checkpoints, for people: which there are, and whether they are whole."""

from math import prod
from pathlib import Path
from typing import NamedTuple

from primitives.checkpoint.exchange import OneRank
from primitives.checkpoint.folder import CheckpointRoot, read_manifest, step_of
from primitives.checkpoint.reader import read_contents, verify
from primitives.errors import CheckpointCorrupt


class Found(NamedTuple):
    """One committed checkpoint."""

    path: Path
    step: int
    generation: int | None
    """counts the saves into its root; the highest is the latest; None if that cannot be read"""
    world_size: int | None
    """ranks that saved it"""
    num_files: int
    nbytes: int
    num_tensors: int
    numel: int
    problem: str | None
    """why it cannot be loaded, with the file's name"""


def survey(path: Path, *, digests: bool) -> list[Found]:
    """Looks at a folder of checkpoints, or at one checkpoint, ascending by step.

    Args:
        path: a root, or a committed folder in one.
        digests: read every byte; otherwise names and sizes of the files, manifest and index.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    root = CheckpointRoot(path)
    folders = [root.folder(step) for step in root.steps()]
    if not folders:
        try:
            step_of(path)
        except ValueError:
            raise FileNotFoundError(f"{path}: no checkpoint here") from None
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder")
        folders = [path]
    return [_look(folder, digests) for folder in folders]


def _look(folder: Path, digests: bool) -> Found:
    step = step_of(folder)
    files = [entry.stat().st_size for entry in folder.iterdir() if entry.is_file()]
    generation = world_size = None
    num_tensors = numel = 0
    problem = None
    try:
        manifest = read_manifest(folder)
        generation, world_size = manifest.generation, manifest.world_size
        tensors = read_contents(folder).tensors
        num_tensors, numel = len(tensors), sum(prod(kind.shape) for kind in tensors.values())
        if digests:
            verify(folder, step, OneRank())
    except (CheckpointCorrupt, OSError) as error:
        problem = str(error)
    return Found(
        folder, step, generation, world_size, len(files), sum(files), num_tensors, numel, problem
    )
