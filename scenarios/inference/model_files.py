"""A frozen model in a folder: weights, tokenizer, sizes, and where they come from.

``model.safetensors`` holds every parameter whole, in canonical layout and in the compute dtype, as
training rounds it; ``model.json`` the sizes, the provenance and the SHA-256 of the other files;
``tokenizer.json`` is there if the model was trained on text by one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from primitives import canonical
from primitives.layout import NUM_SLICES
from scenarios.golden import write_atomically
from scenarios.models.families import DTYPES
from scenarios.models.gpt import Gpt
from scenarios.parallel.leaves import leaf_name
from scenarios.parallel.mesh import Mesh, Stage
from scenarios.parallel.random_keys import random_key
from scenarios.scenario import ModelConfig

FORMAT = 1
WEIGHTS, TOKENIZER, FACTS = "model.safetensors", "tokenizer.json", "model.json"


@dataclass(frozen=True)
class FrozenModel:
    """A folder whose files have been verified."""

    folder: Path
    config: ModelConfig
    eod: int | None
    """The token that ends a document."""
    provenance: dict[str, Any]

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, if it has one."""
        path = self.folder / TOKENIZER
        return path if path.is_file() else None

    def load(self, mesh: Mesh) -> Gpt:
        """This rank's stage with its weights.

        Raises:
            ValueError: a tensor is missing or of another shape or dtype.
        """
        dtype = DTYPES[self.config.precision]
        model = Gpt(self.config, dtype, mesh.stage)
        model.allocate(mesh)
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            for layer in model.parameter_layers():
                for spec in layer.specs:
                    if spec.name not in names:
                        raise ValueError(f"{self.folder / WEIGHTS}: no tensor {spec.name}")
                    whole = file.get_slice(spec.name)
                    cut = spec.total_blocks > 1
                    first = spec.first_block if cut else 0
                    expected = [spec.total_blocks, *spec.shape[1:]] if cut else [*spec.shape]
                    if whole.get_shape() != expected:
                        raise ValueError(
                            f"{self.folder / WEIGHTS}: {spec.name}: got shape {whole.get_shape()}, "
                            f"expected {expected}"
                        )
                    values = whole[first : first + spec.shape[0]]
                    if values.dtype != dtype:
                        raise ValueError(
                            f"{self.folder / WEIGHTS}: {spec.name}: got {values.dtype}, "
                            f"expected {dtype}"
                        )
                    getattr(layer, spec.name.rpartition(".")[2]).data.copy_(values)
        return model


def read_model(folder: Path) -> FrozenModel:
    """Reads and verifies a folder.

    Raises:
        ValueError: a file is missing, changed, or not of this format.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"got format {facts['format']!r}, expected {FORMAT}")
        config = ModelConfig.build(**facts["model"])
        eod, provenance, digests = facts["eod"], facts["provenance"], dict(facts["sha256"])
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: got no {FACTS}, expected the folder of a frozen model"
        ) from None
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: corrupt: {error!r}") from None
    for name, expected in digests.items():
        file = folder / name
        got = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
        if got != expected:
            raise ValueError(f"{file}: corrupt: got SHA-256 {got}, expected {expected}")
    return FrozenModel(folder, config, eod, provenance)


def write_model(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    *,
    tokenizer: Path | None,
    eod: int | None,
    provenance: dict[str, Any],
) -> None:
    """Writes a folder that ``read_model`` reads.

    Args:
        folder: new or empty.
        config: of the model.
        weights: whole parameters in canonical layout and in the compute dtype.
        tokenizer: a tokenizer.json to copy.
        eod: the token that ends a document.
        provenance: plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # the library keeps it private
    if tokenizer is not None:
        (folder / TOKENIZER).write_bytes(tokenizer.read_bytes())
    files = [WEIGHTS, *([TOKENIZER] if tokenizer is not None else [])]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    facts = {
        "format": FORMAT,
        "model": config.model_dump(mode="json"),
        "eod": eod,
        "provenance": provenance,
        "sha256": digests,
    }
    write_atomically(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def whole_weights(config: ModelConfig, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters from the leaves of a checkpoint's main parameters, in the compute dtype.

    Args:
        config: of the model.
        leaves: leaf name -> [slice numel] fp32.
    """
    dtype = DTYPES[config.precision]
    weights = {}
    for layer in Gpt(config, dtype, Stage()).parameter_layers():
        for spec in layer.specs:
            pieces = [
                leaves[leaf_name(spec.name, block, index)]
                for block in range(spec.num_blocks)
                for index in range(NUM_SLICES)
            ]
            weights[spec.name] = torch.cat(pieces).view(spec.shape).to(dtype)
    return weights


def initial_weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """The parameters that training with this seed starts from, in the compute dtype."""
    dtype = DTYPES[config.precision]
    weights = {}
    for layer in Gpt(config, dtype, Stage()).parameter_layers():
        for spec in layer.specs:
            values = torch.full(spec.shape, spec.init_mean)
            if spec.init_std:
                key = random_key(seed, "init", spec.name)
                values = canonical.random_normal(spec.shape, key) * spec.init_std
            weights[spec.name] = values.to(dtype)
    return weights
