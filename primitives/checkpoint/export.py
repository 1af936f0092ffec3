"""A checkpoint's model as the safetensors files that Hugging Face reads."""

import json
import secrets
import shutil
from pathlib import Path

import torch

from primitives.checkpoint.exchange import OneRank
from primitives.checkpoint.folder import CheckpointRoot
from primitives.checkpoint.reader import fill, plan_reads, read_contents, read_index, verify
from primitives.checkpoint.shard_file import DTYPES, Layout, stream_tensors, sync_directory
from primitives.errors import CheckpointSaveFailed

MODEL = "model/"


def export_hf(
    root: CheckpointRoot,
    target: Path,
    step: int | None = None,
    *,
    max_shard_nbytes: int = 5_000_000_000,
) -> list[str]:
    """Writes the model of a checkpoint of ``FSDPCheckpointManager``, verified first.

    One tensor at a time is in memory. Of tied weights the first name is written, once.

    Args:
        root: the checkpoints.
        target: folder that does not exist yet or is empty; it appears when it is complete.
        step: which checkpoint; None for the one saved last.
        max_shard_nbytes: a file is closed before it would hold more tensor bytes than that.

    Returns:
        The names of the safetensors files.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointCorrupt: a file of it is missing, foreign or changed.
        ValueError: it holds no model, or the target is not empty.
        CheckpointSaveFailed: the target cannot be written.

    Numerics: every tensor keeps the dtype and bits in which it was saved.
    """
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"export: {target} is not empty")
    folder = root.existing_folder(step)
    contents = read_contents(folder)
    verify(folder, contents.step, OneRank())
    tied = contents.values.get("tied", [{}])[0]
    layouts = {
        name: Layout(DTYPES[kind.dtype], kind.shape)
        for key, kind in contents.tensors.items()
        if key.startswith(MODEL)
        and (name := key.removeprefix(MODEL).replace("~1", "/").replace("~0", "~")) not in tied
    }
    if not layouts:
        raise ValueError(f"export: {folder} holds no model")
    index = read_index(folder)

    def get(name: str) -> torch.Tensor:
        full = torch.empty(layouts[name].shape, dtype=layouts[name].dtype)
        fill(folder, plan_reads(folder, index, {"model": {name: full}}))
        return full

    staging = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        staging.mkdir(parents=True)
        files = _cut(layouts, max_shard_nbytes)
        for file, names in files.items():
            chosen = {name: layouts[name] for name in names}
            stream_tensors(staging / file, chosen, get, {"format": "pt"})
        if len(files) > 1:
            total = sum(layout.nbytes for layout in layouts.values())
            weight_map = {name: file for file, names in files.items() for name in names}
            document = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(document, indent=2, sort_keys=True) + "\n"
            (staging / "model.safetensors.index.json").write_text(text)
        sync_directory(staging)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        raise CheckpointSaveFailed(f"export: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return list(files)


def _cut(layouts: dict[str, Layout], max_shard_nbytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors."""
    runs: list[list[str]] = [[]]
    nbytes = 0
    for name in sorted(layouts):
        if runs[-1] and nbytes + layouts[name].nbytes > max_shard_nbytes:
            runs.append([])
            nbytes = 0
        runs[-1].append(name)
        nbytes += layouts[name].nbytes
    if len(runs) == 1:
        return {"model.safetensors": runs[0]}
    return {
        f"model-{number:05d}-of-{len(runs):05d}.safetensors": names
        for number, names in enumerate(runs, 1)
    }
