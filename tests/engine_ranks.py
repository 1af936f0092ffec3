"""Four ranks that play the cases of test_engine_layouts.py: one start serves all of them.

Run as ``python -m tests.engine_ranks FOLDER RANK``; rank 0 of a case writes its metrics as JSON.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from primitives import backend
from primitives.checkpoint import CheckpointManager
from scenarios.engines.builtin import Trainer
from scenarios.parallel import gradient_reduce
from scenarios.parallel.buckets import Bucket
from scenarios.parallel.parameters import ParameterSpec
from tests.engine_scenarios import tiny_scenario

WORLD_SIZE = 4
Metrics = list[dict[str, Any]]


def play(trainer: Trainer, num_steps: int) -> Metrics:
    """Metrics of the next steps."""
    trainer.gather.start()
    metrics = [dict(trainer.train_step()) for _ in range(num_steps)]
    trainer.gather.finish()
    return metrics


def write(folder: Path, name: str, metrics: Metrics) -> None:
    """For the test to read."""
    (folder / f"{name}.json").write_text(json.dumps(metrics))


def forget_one_reduce_scatter(*_: Any) -> None:
    """A bucket's gradients are never reduced: each rank keeps its own partial sums."""

    def keep_own(shard: torch.Tensor, full: torch.Tensor, **_: Any) -> None:
        shard.copy_(full.view(-1, shard.numel())[dist.get_rank()])

    gradient_reduce.reduce_scatter_flat = keep_own


def drop_a_token_block(*_: Any) -> None:
    """The last token block of one LayerNorm bias is left out of its gradient."""
    read = Bucket.read_gradient

    def forgetful(bucket: Bucket, spec: ParameterSpec) -> torch.Tensor:
        partials = read(bucket, spec)
        if spec.name == "decoder.layers.1.input_layernorm.bias":
            partials[-1].zero_()
        return partials

    Bucket.read_gradient = forgetful  # type: ignore[method-assign]


def stale_parameters(trainer: Trainer) -> None:
    """One bucket's parameters reach the model at the start and never again."""
    bucket = trainer.buckets[0]
    read, missing = bucket.read_parameter, {spec.name for spec in bucket.specs}

    def first_time_only(spec: ParameterSpec, out: torch.Tensor) -> None:
        if spec.name in missing:
            missing.remove(spec.name)
            read(spec, out)

    bucket.read_parameter = first_time_only  # type: ignore[method-assign]


BUGS: dict[str, Callable[[Trainer], None]] = {
    "forgotten reduce_scatter": forget_one_reduce_scatter,
    "dropped token block": drop_a_token_block,
    "stale parameters": stale_parameters,
}


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    backend.register()
    store = dist.FileStore(str(folder / "store"), WORLD_SIZE)
    dist.init_process_group("primitives", store=store, rank=rank, world_size=WORLD_SIZE)
    # Rank 3 is in fewer groups than the others, which the checkpoint manager must not mind.
    pair, single = (dist.new_group(ranks) for ranks in ([0, 1], [2]))
    saved = folder / "checkpoints"

    trainer = Trainer(tiny_scenario(4))
    metrics = play(trainer, 3)
    manager = CheckpointManager(saved)
    trainer.state.save(manager, asynchronous=True)
    metrics += play(trainer, 3)
    manager.wait()
    if rank == 0:
        write(folder, "dp4", metrics)
    plain = play(Trainer(tiny_scenario(4, overlap=False), bucket_numel=1), 6)
    if rank == 0:
        write(folder, "dp4 no overlap, one bucket per parameter", plain)
    few = play(Trainer(tiny_scenario(4, micro_batch_size=4)), 2)
    if rank == 0:
        write(folder, "dp4 of one microbatch", few)
    dist.barrier()

    group, dp = (pair, 2) if rank < 2 else (single, 1)
    if rank < 3:
        metrics = play(Trainer(tiny_scenario(dp), group), 6)
        if rank != 1:
            write(folder, f"dp{dp}", metrics)
        resumed = Trainer(tiny_scenario(dp), group)
        resumed.state.load(CheckpointManager(saved, process_group=group))
        metrics = play(resumed, 3)
        if rank != 1:
            write(folder, f"dp4 resumed at dp{dp}", metrics)
    if rank == 2:
        few = play(Trainer(tiny_scenario(1, micro_batch_size=4), group), 2)
        write(folder, "dp1 of four microbatches", few)
    dist.barrier()

    originals = gradient_reduce.reduce_scatter_flat, Bucket.read_gradient
    for name, inject in BUGS.items():
        trainer = Trainer(tiny_scenario(4))
        inject(trainer)
        metrics = play(trainer, 6)
        gradient_reduce.reduce_scatter_flat = originals[0]
        Bucket.read_gradient = originals[1]  # type: ignore[method-assign]
        if rank == 0:
            write(folder, name, metrics)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
