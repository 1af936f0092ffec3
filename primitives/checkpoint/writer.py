"""All ranks write one checkpoint, or none of it counts."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from primitives.checkpoint.chunks import Box, LocalState, Plan, make_plan, outline
from primitives.checkpoint.exchange import Exchange, agree
from primitives.checkpoint.folder import CheckpointRoot
from primitives.checkpoint.plain_values import canonical_json
from primitives.checkpoint.shard_file import (
    FileRecord,
    sync_directory,
    tensor_digest,
    write_file,
    write_tensors,
)

INDEX = "index.json"


def shard_name(rank: int) -> str:
    """The file a rank writes."""
    return f"shard_{rank:05d}.safetensors"


def entry_name(key: str, box: Box, shape: tuple[int, ...]) -> str:
    """The name of a box inside its file: the key, with the offset unless the tensor is whole."""
    if box.shape != shape:
        return f"{key}[{','.join(map(str, box.offset))}]"
    # Names stay unique, and never are the one that safetensors keeps for itself.
    return f"{key}[]" if key.endswith("]") or key == "__metadata__" else key


def save_state(
    root: CheckpointRoot,
    step: int,
    make_local: Callable[[], LocalState],
    exchange: Exchange,
    keep: int | None,
) -> None:
    """Writes and commits one checkpoint. Collective over the exchange.

    Args:
        root: where.
        step: the step it belongs to; an existing checkpoint of it is replaced.
        make_local: gives this rank's part; its errors are raised on every rank.
        exchange: the ranks.
        keep: how many of the checkpoints saved last stay; None for all.

    Raises:
        ValueError: the state of a rank cannot be stored or contradicts another rank's.
        CheckpointSaveFailed: a rank could not write; earlier checkpoints are untouched.
    """
    rank, world_size = exchange.rank, exchange.world_size
    with ExitStack() as cleanup:

        def begin() -> tuple[Path | None, LocalState]:
            staging = None
            if rank == 0:
                cleanup.enter_context(root.locked())
                staging = root.stage(step)
                # After the commit this name no longer exists, and nothing is removed.
                cleanup.callback(shutil.rmtree, staging, ignore_errors=True)
            return staging, make_local()

        mine: list[LocalState] = []

        def announce() -> tuple[Path | None, Any]:
            staging, local = begin()
            mine.append(local)
            return staging, outline(local)

        answers = agree(exchange, announce)
        staging = answers[0][0]
        assert staging is not None
        plan = make_plan([answer[1] for answer in answers])
        local = mine[0]
        if plan.copies:
            _check_copies(plan, agree(exchange, lambda: _digests_of_copies(plan, local, rank)))
        records = agree(exchange, lambda: _write_shard(plan, local, staging, rank))

        def commit() -> None:
            if rank:
                return
            files = {shard_name(i): record for i, record in enumerate(records) if record}
            index = canonical_json(_index(plan))
            files[INDEX] = write_file(staging / INDEX, iter([memoryview(index)]))
            root.commit(staging, step, world_size, files)
            if keep is not None:
                root.keep_newest(keep)

        agree(exchange, commit)


def _digests_of_copies(plan: Plan, local: LocalState, rank: int) -> dict[tuple[str, Box], str]:
    return {
        (key, box): tensor_digest(local.tensors[key].boxes[box])
        for (key, box), ranks in plan.copies.items()
        if rank in ranks
    }


def _check_copies(plan: Plan, digests: list[dict[tuple[str, Box], str]]) -> None:
    for (key, box), ranks in plan.copies.items():
        first, *others = ranks
        for other in others:
            if digests[other][key, box] != digests[first][key, box]:
                raise ValueError(
                    f"checkpoint key {key!r}: the tensor on rank {other} differs from the one on "
                    f"rank {first}; a key saved by several ranks must be equal on all of them"
                )


def _write_shard(plan: Plan, local: LocalState, staging: Path, rank: int) -> FileRecord | None:
    tensors: dict[str, torch.Tensor] = {}
    for (key, box), writer in plan.writers.items():
        if writer == rank:
            tensors[entry_name(key, box, plan.kinds[key].shape)] = local.tensors[key].boxes[box]
    if not tensors:
        return None
    record = write_tensors(staging / shard_name(rank), tensors)
    sync_directory(staging)
    return record


def _index(plan: Plan) -> dict[str, Any]:
    chunks: dict[str, list[dict[str, Any]]] = {key: [] for key in plan.kinds}
    for (key, box), writer in plan.writers.items():
        chunks[key].append(
            {
                "offset": box.offset,
                "shape": box.shape,
                "file": shard_name(writer),
                "name": entry_name(key, box, plan.kinds[key].shape),
            }
        )
    tensors = {
        key: {"dtype": kind.dtype, "shape": kind.shape, "chunks": chunks[key]}
        for key, kind in plan.kinds.items()
    }
    return {"tensors": tensors, "values": plan.values}
