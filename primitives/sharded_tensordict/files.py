"""Batches on disk: one safetensors file, or a folder of memory-mapped tensors. No pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from tensordict import TensorDict
from torch import Tensor

from primitives.checkpoint.plain_values import decode, encode
from primitives.sharded_tensordict.schema import Part, dense_parts, leaves_of

if TYPE_CHECKING:
    from primitives.sharded_tensordict.batch import Batch

VALUES = "values.json"
Content = tuple[TensorDict, dict[str, Any], dict[str, Any]]


def save(batch: "Batch", path: Path) -> None:
    """Writes tensors, columns and meta of a batch as one safetensors file.

    Raises:
        ValueError: a column or meta holds what ``plain_values.encode`` cannot store.
    """
    text, parts = _describe(batch)
    tensors = {str(n): part.detach().contiguous() for n, part in enumerate(parts.values())}
    # Tensors that share memory are refused by safetensors, so each gets its own.
    save_file({name: t.clone() for name, t in tensors.items()}, path, {"batch": text})


def load(path: Path) -> Content:
    """Tensors, columns and meta that ``save`` wrote.

    Raises:
        ValueError: the file was not written by ``save``.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "batch" not in metadata:
            raise ValueError(f"{path}: not a batch")
        tensors = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _content(metadata["batch"], tensors)


def memmap(batch: "Batch", folder: Path) -> None:
    """Writes a batch into a new folder of memory-mapped tensors.

    Raises:
        ValueError: as ``save``; or the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"memmap: {folder} is not empty")
    text, parts = _describe(batch)
    tensors = {str(n): part.detach() for n, part in enumerate(parts.values())}
    TensorDict(tensors, batch_size=[]).memmap(folder / "tensors")
    (folder / VALUES).write_text(text)


def load_memmap(folder: Path) -> Content:
    """A batch that ``memmap`` wrote; its tensors are read when they are used.

    Raises:
        ValueError: the folder was not written by ``memmap``.
    """
    if not (folder / VALUES).exists():
        raise ValueError(f"{folder}: not a batch")
    tensors = TensorDict.load_memmap(folder / "tensors")
    # As plain tensors: tensordict's own class lacks some of their methods.
    found = {int(name): tensor.as_subclass(Tensor) for name, tensor in tensors.items()}
    return _content((folder / VALUES).read_text(), found)


def _describe(batch: "Batch") -> tuple[str, dict[Part, Tensor]]:
    parts = dense_parts(batch.leaves())
    document = {
        "num_rows": len(batch),
        "parts": [[key if isinstance(key, str) else list(key), part] for key, part in parts],
        "columns": {
            name: [encode(value, f"columns/{name}") for value in values]
            for name, values in batch.columns.items()
        },
        "meta": {name: encode(value, f"meta/{name}") for name, value in batch.meta.items()},
    }
    return json.dumps(document), parts


def _content(text: str, tensors: Mapping[int, Tensor]) -> Content:
    document = json.loads(text)
    keys = [(key if isinstance(key, str) else tuple(key), part) for key, part in document["parts"]]
    leaves = leaves_of({part: tensors[number] for number, part in enumerate(keys)})
    batch = TensorDict({}, batch_size=[document["num_rows"]])
    for key, leaf in leaves.items():
        batch[key] = leaf
    columns = {
        name: [decode(value) for value in values] for name, values in document["columns"].items()
    }
    return batch, columns, {name: decode(value) for name, value in document["meta"].items()}
