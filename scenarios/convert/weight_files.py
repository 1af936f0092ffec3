"""Weights between Hugging Face's safetensors and one folder of them for each Megatron rank.

A Megatron folder holds ``conversion.json``, ``tp{t}_pp{p}`` with what every data parallel rank
has, and ``ep{e}_etp{t}_pp{p}`` with the experts. Names are those of megatron-core's local
specification; layers count from 0 in each stage, and ``model{v}.`` stands before the names of a
virtual stage. One tensor is in memory at a time, and what waits for a file to be full.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scenarios.convert.converter import convert, read_config
from scenarios.convert.families import family_of
from scenarios.convert.layout import ParallelLayout
from scenarios.convert.mapping import Mapped, OfExperts
from scenarios.convert.megatron import MegatronModel
from scenarios.convert.tensor_files import MAX_FILE_NBYTES, TensorFolder, TensorWriter
from scenarios.convert.weights import (
    Parameter,
    copies,
    cut_part,
    join_parts,
    mapped,
    parameters,
    source_names,
)

CONVERSION = "conversion.json"
EMBEDDING = "embedding.word_embeddings.weight"
NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "embeddings.position_ids")
"""How names of buffers end that old files hold and that are computed anew."""


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder as Megatron parameters."""

    def __init__(self, folder: Path, model: MegatronModel) -> None:
        """Raises: ValueError: a tensor is missing, or one would be left over."""
        family = family_of(model.model_type)
        self._tensors = TensorFolder(folder, family.old_endings)
        self._model = model
        first = mapped(model, next(parameters(model))).sources[0]
        found = [base for base in family.bases if first.format(base=base) in self._tensors]
        if not found:
            raise ValueError(f"{folder}: tensor {first.format(base=family.bases[0])!r} is missing")
        self.base = found[0]
        """What {base} stands for in this folder's names."""
        self.copies: dict[str, str] = {}
        """Tensors of the folder that repeat another."""
        self._check_complete(family.other_tensors)

    def read(self, parameter: Parameter) -> Tensor:
        """One whole parameter.

        Raises:
            ValueError: the tensors have other sizes than the configuration says.
        """
        form = mapped(self._model, parameter)
        names = self._names(parameter, form)
        row = parameter.expert if isinstance(form, OfExperts) else None
        try:
            return form.join([self._tensors.read(n, row) for n in names], self._model.transformer)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{', '.join(names)}: sizes do not fit the configuration: {error}"
            ) from None

    def _names(self, parameter: Parameter, form: Mapped) -> list[str]:
        return source_names(family_of(self._model.model_type), form, parameter, self.base)

    def _check_complete(self, other: tuple[str, ...]) -> None:
        needed = {
            name
            for parameter in parameters(self._model)
            for name in self._names(parameter, mapped(self._model, parameter))
        }
        missing = sorted(needed - {*self._tensors})
        if missing:
            advice = ""
            if re.search(r"\.(eh_proj|enorm|hnorm)\.", " ".join(missing)):
                advice = "; a model without multi-token prediction has mtp_num_layers 0"
            raise ValueError(f"{self._tensors.folder}: tensor {missing[0]!r} is missing{advice}")
        left = [
            name
            for name in self._tensors
            if name not in needed and not name.startswith(other) and not name.endswith(NOT_WEIGHTS)
        ]
        for copy, original in copies(self._model, self.base).items():
            if copy in left and _same_bits(self._tensors.read(copy), self._tensors.read(original)):
                left.remove(copy)
                self.copies[copy] = original
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ValueError(
                f"{self._tensors.folder}: tensor {left[0]!r}{more} belongs to no parameter of the "
                "converted model, and would be lost"
            )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def to_megatron(
    source: Path,
    target: Path,
    config: Any,
    *,
    layout: ParallelLayout | None = None,
    overrides: dict[str, Any] | None = None,
    max_file_nbytes: int = MAX_FILE_NBYTES,
) -> MegatronModel:
    """Write a Hugging Face folder's weights for every rank of a layout.

    Args:
        source: folder of safetensors.
        target: new or empty folder.
        config: as ``convert`` takes it.
        layout: how the model is cut.
        overrides: as ``convert`` takes them.
        max_file_nbytes: a file is closed before it grows beyond.
    Returns:
        The converted model.
    Raises:
        ValueError: as ``convert``, or tensors are missing, left over or of wrong sizes.
    """
    layout = layout or ParallelLayout()
    model = convert(config, layout=layout, overrides=overrides)
    weights = HuggingFaceWeights(source, model)
    _check_new(target)
    for folder, held in _rank_folders(model):
        writer = TensorWriter(target / folder, max_file_nbytes)
        for name, parameter, rank, degree in held:
            writer.add(name, cut_part(weights.read(parameter), parameter.cut, rank, degree))
        writer.close()
    _, hf = read_config(config)
    document = {
        "config": {"model_type": model.model_type, **hf},
        "layout": layout.model_dump(),
        "overrides": overrides or {},
        "base": weights.base,
        "copies": weights.copies,
    }
    (target / CONVERSION).write_text(json.dumps(document, indent=1, default=str) + "\n")
    return model


def to_hugging_face(
    source: Path, target: Path, *, max_file_nbytes: int = MAX_FILE_NBYTES
) -> MegatronModel:
    """Put the ranks' weights together again, under Hugging Face's names.

    Args:
        source: a folder that ``to_megatron`` wrote, with the same or trained weights.
        target: new or empty folder.
        max_file_nbytes: a file is closed before it grows beyond.
    Returns:
        The model as it was converted.
    Raises:
        ValueError: tensors are missing, or copies that must be equal are not.
    """
    try:
        document = json.loads((source / CONVERSION).read_text())
    except OSError as error:
        raise ValueError(f"{source / CONVERSION}: cannot be read: {error.strerror}") from None
    layout = ParallelLayout.build(**document["layout"])
    model = convert(document["config"], layout=layout, overrides=document["overrides"])
    places: dict[str, list[tuple[TensorFolder, str, int]]] = {}
    for folder, held in _rank_folders(model):
        tensors = TensorFolder(source / folder)
        for name, parameter, part, _ in held:
            places.setdefault(parameter.name, []).append((tensors, name, part))
    _check_new(target)
    writer = TensorWriter(target / "weights", max_file_nbytes)
    of_experts: dict[str, list[Tensor]] = {}
    for parameter in parameters(model):
        form = mapped(model, parameter)
        whole = _join(parameter, places[parameter.name])
        names = source_names(family_of(model.model_type), form, parameter, document["base"])
        for name, tensor in zip(names, form.split(whole, model.transformer), strict=True):
            if not isinstance(form, OfExperts):
                writer.add(name, tensor)
                for copy in (c for c, original in document["copies"].items() if original == name):
                    writer.add(copy, tensor.clone())
                continue
            of_experts.setdefault(name, []).append(tensor)
            if len(of_experts[name]) == model.transformer.num_moe_experts:
                writer.add(name, torch.stack(of_experts.pop(name)))
    writer.close()
    for file in (target / "weights").iterdir():
        file.rename(target / file.name)
    (target / "weights").rmdir()
    (target / "config.json").write_text(json.dumps(document["config"], indent=1) + "\n")
    return model


def _join(parameter: Parameter, places: list[tuple[TensorFolder, str, int]]) -> Tensor:
    """The whole parameter from its parts by number; copies of a part must be equal."""
    parts: dict[int, tuple[Tensor, str]] = {}
    for tensors, name, part in places:
        tensor, rank = tensors.read(name), tensors.folder.name
        first, other = parts.setdefault(0 if parameter.cut == "none" else part, (tensor, rank))
        if not torch.equal(tensor, first):
            raise ValueError(f"{name}: {rank} and {other} hold different copies")
    return join_parts([parts[part][0] for part in sorted(parts)], parameter.cut)


Held = list[tuple[str, Parameter, int, int]]
"""Name on the rank, parameter, which of how many parts of it."""


def _rank_folders(model: MegatronModel) -> Iterator[tuple[str, Held]]:
    """Folder of a rank -> what it holds; for a parameter, in the order of its parts."""
    fields = model.transformer
    tp, etp = fields.tensor_model_parallel_size, fields.expert_tensor_parallel_size
    ep, experts = fields.expert_model_parallel_size, fields.num_moe_experts or 0
    all_parameters = list(parameters(model))
    for stage in range(fields.pipeline_model_parallel_size):
        held = list(_of_stage(model, all_parameters, stage))
        for rank in range(tp):
            yield (
                f"tp{rank}_pp{stage}",
                [(name, p, rank, tp) for name, p in held if p.expert is None],
            )
        for group in range(ep) if any(p.expert is not None for _, p in held) else ():
            mine = range(group * experts // ep, (group + 1) * experts // ep)
            for rank in range(etp):
                yield (
                    f"ep{group}_etp{rank}_pp{stage}",
                    [
                        (_local_expert(name, p, mine), p, rank, etp)
                        for name, p in held
                        if p.expert is not None and p.expert in mine
                    ],
                )


def _of_stage(
    model: MegatronModel, all_parameters: list[Parameter], stage: int
) -> Iterator[tuple[str, Parameter]]:
    """The parameters of one stage, under the names they have there."""
    stages = model.transformer.stages()
    parts = stages[stage]
    prefix = "model{}." if len(parts) > 1 else ""
    is_last = stage == len(stages) - 1
    for parameter in all_parameters:
        if parameter.layer is not None and parameter.layer >= model.transformer.num_layers:
            if is_last:  # Multi-token prediction.
                yield prefix.format(len(parts) - 1) + parameter.name, parameter
        elif parameter.layer is not None:
            for part, layers in enumerate(parts):
                if parameter.layer in layers:
                    local = layers.index(parameter.layer)
                    yield (
                        prefix.format(part)
                        + parameter.pattern.format(layer=local, expert=parameter.expert),
                        parameter,
                    )
        elif parameter.name.startswith("embedding."):
            if stage == 0:
                yield prefix.format(0) + parameter.name, parameter
            if parameter.name == EMBEDDING and is_last and stage > 0:
                at = prefix.format(len(parts) - 1)
                if model.transformer.mtp_num_layers:
                    yield at + EMBEDDING, parameter
                if model.gpt_model.share_embeddings_and_output_weights:
                    yield at + "output_layer.weight", parameter
        elif is_last:
            yield prefix.format(len(parts) - 1) + parameter.name, parameter


def _local_expert(name: str, parameter: Parameter, mine: range) -> str:
    assert parameter.expert is not None
    return name.replace(
        f"local_experts.{parameter.expert}.", f"local_experts.{mine.index(parameter.expert)}."
    )


def _check_new(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists; expected a new or empty folder")
    target.mkdir(parents=True, exist_ok=True)
