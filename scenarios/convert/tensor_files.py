"""Folders of safetensors files: read one tensor at a time, written in files of limited size."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
MAX_FILE_NBYTES = 1 << 30


class TensorFolder:
    """The tensors of a folder by name; each is read from its file when it is asked for."""

    def __init__(self, folder: Path, old_endings: Mapping[str, str] | None = None) -> None:
        """Find the tensors.

        Args:
            folder: with safetensors, and an index if there are several files.
            old_endings: how names in the files end -> how they end here.
        Raises:
            ValueError: the folder holds no safetensors, or its index names missing files.
        """
        self.folder = folder
        self._stored: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        index = folder / INDEX
        if index.exists():
            file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            missing = {name for name in file_of.values() if not (folder / name).exists()}
            if missing:
                raise ValueError(f"{index}: names {sorted(missing)[0]}, which does not exist")
        else:
            files = sorted(folder.glob("*.safetensors"))
            if not files:
                raise ValueError(f"{folder}: holds no *.safetensors")
            file_of = {name: file.name for file in files for name in self._file(file.name).keys()}  # noqa: SIM118
        for stored in file_of:
            old = next((old for old in old_endings or () if stored.endswith(old)), "")
            name = stored.removesuffix(old) + (old_endings or {}).get(old, "")
            self._stored[name] = stored
        self._file_of = {name: file_of[stored] for name, stored in self._stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def read(self, name: str, row: int | None = None) -> Tensor:
        """One tensor, or one row of it.

        Raises:
            ValueError: there is no such tensor.
        """
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: tensor {name!r} is missing")
        file = self._file(self._file_of[name])
        stored = self._stored[name]
        tensor: Tensor = file.get_tensor(stored) if row is None else file.get_slice(stored)[row]
        return tensor

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]


class TensorWriter:
    """Writes tensors into numbered files of a new folder, then the index that names them."""

    def __init__(self, folder: Path, max_file_nbytes: int = MAX_FILE_NBYTES) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._max_file_nbytes = max_file_nbytes
        self._waiting: dict[str, Tensor] = {}
        self._nbytes = self._total = 0
        self._file_of: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is in a file at the latest after ``close``."""
        assert name not in self._file_of, name
        if self._waiting and self._nbytes + tensor.nbytes > self._max_file_nbytes:
            self._flush()
        self._file_of[name] = (
            f"model-{len({*self._file_of.values()}) + (not self._waiting):05}.safetensors"
        )
        self._waiting[name] = tensor.contiguous()
        self._nbytes += tensor.nbytes

    def close(self) -> None:
        """Write what waits, and the index."""
        self._flush()
        index = {"metadata": {"total_size": self._total}, "weight_map": self._file_of}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")

    def _flush(self) -> None:
        if self._waiting:
            file = self._file_of[next(iter(self._waiting))]
            save_file(self._waiting, self.folder / file, metadata={"format": "pt"})
        self._total += self._nbytes
        self._waiting, self._nbytes = {}, 0
