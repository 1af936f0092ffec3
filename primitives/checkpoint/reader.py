"""A checkpoint is read in two halves: verify and plan everything, then fill the tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from primitives.checkpoint.chunks import Box, LocalTensor, TensorKind, leaves, local_tensor
from primitives.checkpoint.exchange import Exchange, agree
from primitives.checkpoint.folder import (
    CheckpointRoot,
    step_of,
    verify_digest,
    verify_listing,
)
from primitives.checkpoint.plain_values import decode
from primitives.checkpoint.writer import INDEX
from primitives.errors import CheckpointCorrupt


class Piece(NamedTuple):
    """Part of a stored box that fills part of a tensor of ours."""

    file: str
    name: str
    source: tuple[slice, ...]
    whole: bool
    """the piece is the complete stored box"""
    target: torch.Tensor


class ReadPlan(NamedTuple):
    """Everything a rank does once it is known that nothing can be wrong any more."""

    pieces: list[Piece]
    values: list[tuple[Callable[[Any], None], Any]]


def verify(folder: Path, step: int, exchange: Exchange) -> None:
    """Checks names and sizes of all files and the digests of this rank's share of them.

    Raises:
        CheckpointCorrupt: naming the file.
    """
    manifest = verify_listing(folder, step)
    for number, (name, record) in enumerate(sorted(manifest.files.items())):
        # The index decides what is read, so every rank checks the bytes that it will parse.
        if name == INDEX or number % exchange.world_size == exchange.rank:
            verify_digest(folder, name, record)


class Contents(NamedTuple):
    """What a checkpoint holds. Key parts are joined by "/" ("~1" stands for "/", "~0" for "~")."""

    step: int
    tensors: dict[str, TensorKind]
    values: dict[str, Any]

    def names(self) -> set[str]:
        """The keys of tensors and values."""
        return {*self.tensors, *self.values}


def read_contents(folder: Path) -> Contents:
    """The contents of a committed folder; of the tensors only the file sizes are checked.

    Raises:
        CheckpointCorrupt: a file is missing, foreign or resized, or the index was changed.
    """
    manifest = verify_listing(folder, step_of(folder))
    verify_digest(folder, INDEX, manifest.files[INDEX])
    index = read_index(folder)
    return Contents(
        manifest.step,
        {
            key: TensorKind(stored["dtype"], tuple(stored["shape"]))
            for key, stored in index["tensors"].items()
        },
        {key: decode(value) for key, value in index["values"].items()},
    )


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a verified folder."""
    index: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
    return index


def load_state(
    root: CheckpointRoot, state: dict[str, Any], step: int | None, exchange: Exchange
) -> int:
    """Fills ``state`` from a checkpoint. Collective over the exchange.

    Returns:
        The step that was loaded.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointCorrupt: a file is missing, foreign or changed; ``state`` is untouched.
        ValueError: a key is missing, or its dtype or shape differs; ``state`` is untouched.
    """

    def choose() -> tuple[int, Path] | None:
        if exchange.rank:
            return None
        chosen = root.latest() if step is None else step
        folder = root.existing_folder(chosen)
        assert chosen is not None
        return chosen, folder

    choice = agree(exchange, choose, io_error=CheckpointCorrupt)[0]
    assert choice is not None
    chosen, folder = choice
    agree(exchange, lambda: verify(folder, chosen, exchange), io_error=CheckpointCorrupt)
    plans: list[ReadPlan] = []  # holds this rank's plan, which must not travel
    agree(
        exchange,
        lambda: plans.append(plan_reads(folder, read_index(folder), state)),
        io_error=CheckpointCorrupt,
    )
    agree(exchange, lambda: fill(folder, plans[0]), io_error=CheckpointCorrupt)
    return chosen


def plan_reads(folder: Path, index: dict[str, Any], state: dict[str, Any]) -> ReadPlan:
    """Finds where each entry of ``state`` comes from.

    Raises:
        ValueError: a key is missing, is of the other sort, or has another dtype or shape.
    """
    plan = ReadPlan([], [])
    for key, current, put in leaves(state):
        if isinstance(current, torch.Tensor):
            if key not in index["tensors"]:
                raise ValueError(f"{folder}: {_absent(key, key in index['values'], 'tensor')}")
            _plan_tensor(folder, key, index["tensors"][key], local_tensor(key, current), plan)
        elif key in index["values"]:
            plan.values.append((put, decode(index["values"][key])))
        else:
            raise ValueError(f"{folder}: {_absent(key, key in index['tensors'], 'plain value')}")
    return plan


def _absent(key: str, other_sort: bool, wanted: str) -> str:
    if not other_sort:
        return f"no key {key!r}"
    stored = "plain value" if wanted == "tensor" else "tensor"
    return f"key {key!r} is a {stored}, expected a {wanted}"


def _plan_tensor(
    folder: Path, key: str, stored: dict[str, Any], wanted: LocalTensor, plan: ReadPlan
) -> None:
    kind = TensorKind(stored["dtype"], tuple(stored["shape"]))
    if kind != wanted.kind:
        raise ValueError(
            f"{folder}: key {key!r} is {kind.dtype} {list(kind.shape)}, "
            f"expected {wanted.kind.dtype} {list(wanted.kind.shape)}"
        )
    for box, data in wanted.boxes.items():
        found = 0
        for chunk in stored["chunks"]:
            outer = Box(tuple(chunk["offset"]), tuple(chunk["shape"]))
            common = box.overlap(outer)
            if common is None:
                continue
            found += common.numel
            target = data[common.slices_within(box)]
            source = common.slices_within(outer)
            plan.pieces.append(Piece(chunk["file"], chunk["name"], source, common == outer, target))
        if found != box.numel:
            raise CheckpointCorrupt(
                f"{folder / INDEX}: key {key!r} holds {found} of the {box.numel} elements at "
                f"{list(box.offset)}"
            )


@torch.no_grad()
def fill(folder: Path, plan: ReadPlan) -> None:
    """Copies the planned pieces into their tensors and puts the plain values in place."""
    by_file: dict[str, list[Piece]] = {}
    for piece in plan.pieces:
        by_file.setdefault(piece.file, []).append(piece)
    for name, pieces in by_file.items():
        with safe_open(folder / name, framework="pt") as file:
            for piece in pieces:
                if piece.whole:
                    piece.target.copy_(file.get_tensor(piece.name))
                else:
                    piece.target.copy_(file.get_slice(piece.name)[piece.source])
    for put, value in plan.values:
        put(value)
