"""Eight ranks that play the cases of test_engine_layouts.py: one start serves all of them.

The ranks of a case's layout form a world of
their own; its rank 0 writes the metrics as JSON.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from primitives import backend
from primitives.checkpoint import CheckpointManager
from primitives.rank_group import RankGroup
from scenarios.engines.builtin import Trainer
from scenarios.engines.training_state import KINDS
from scenarios.fork_server import ForkServer
from scenarios.layout import Layout
from scenarios.parallel import gradient_reduce
from scenarios.parallel.buckets import Bucket
from scenarios.parallel.leaves import ReplicasDiffer
from scenarios.parallel.mesh import Mesh
from scenarios.parallel.microbatch import Microbatch
from scenarios.parallel.parameters import ParameterSpec
from tests.engine_scenarios import tiny_scenario

NUM_RANKS = 8
NUM_STEPS, SAVED_AT = 6, 3
Metrics = list[dict[str, Any]]

LAYOUTS = [
    "dp1",
    "dp4",
    "dp2,zero0",
    "dp8",
    "tp8",
    "tp2",
    "tp4,sp",
    "tp2,dp2,sp",
    "tp2,dp4,sp,zero0",
    "pp2",
    "pp4,dp2",
    "pp2,dp2,zero0",
    "tp2,pp2,dp2,sp",
    "tp2,pp4,sp",
    "tp4,pp2",
]
SAVED = ["dp4", "tp2,pp2,dp2,sp", "pp4,dp2", "tp2,dp4,sp,zero0"]
"""Each of them is resumed in every other."""


def play_cases(module: str, num_ranks: int, folder: Path) -> dict[str, Metrics]:
    """Starts the ranks of this module or one like it; what they wrote, by the name of the case."""
    logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with ForkServer() as server:
        ranks = [
            server.start(
                f"{module}:main", str(folder), str(r), environment=environment, log=logs[r]
            )
            for r in range(num_ranks)
        ]
        codes = [process.wait() for process in ranks]
    assert codes == [0] * num_ranks, "\n".join(log.read_text() for log in logs)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def play(trainer: Trainer, num_steps: int) -> Metrics:
    """Metrics of the next steps, then the digests of all state."""
    trainer.gather.start()
    metrics = [dict(trainer.train_step()) for _ in range(num_steps)]
    trainer.gather.finish()
    state = {
        kind: hashlib.sha256(trainer.state.digests(kind).numpy().tobytes()).hexdigest()
        for kind in KINDS
    }
    return [*metrics, state]


def skip_reduce_scatter(_: Trainer) -> Any:
    """A bucket's gradients are never reduced: each rank keeps its own partial sums."""

    def keep_own(group: RankGroup, shard: torch.Tensor, full: torch.Tensor, **_: Any) -> None:
        shard.copy_(full.view(-1, shard.numel())[group.rank])

    return mock.patch.object(RankGroup, "reduce_scatter_into", keep_own)


def drop_a_token_block(_: Trainer) -> Any:
    """The last token block of one LayerNorm bias is left out of its gradient."""
    read = Bucket.read_gradient

    def forgetful(bucket: Bucket, spec: ParameterSpec) -> torch.Tensor:
        partials = read(bucket, spec)
        if spec.name == "decoder.layers.1.input_layernorm.bias":
            partials[-1].zero_()
        return partials

    return mock.patch.object(Bucket, "read_gradient", forgetful)


def stale_parameters(trainer: Trainer) -> Any:
    """One bucket's parameters reach the model at the start and never again."""
    bucket = trainer.buckets[0]
    read, missing = bucket.read_parameter, {spec.name for spec in bucket.specs}

    def first_time_only(spec: ParameterSpec, out: torch.Tensor) -> None:
        if spec.name in missing:
            missing.remove(spec.name)
            read(spec, out)

    return mock.patch.object(bucket, "read_parameter", first_time_only)


def skip_all_reduce(_: Trainer) -> Any:
    """Token sums stay apart on the tp ranks, lookup and head of the tied table on the stages."""
    return mock.patch.object(gradient_reduce, "_all_reduce", return_value=None)


def skip_sum_over_tp(_: Trainer) -> Any:
    """Every tp rank goes on with the sum over its own parts."""
    return mock.patch.object(Mesh, "sum_over_tp", lambda mesh, partial: partial)


def wrong_token_slice(_: Trainer) -> Any:
    """Every sequence-parallel rank draws the dropout of the first rank's tokens."""

    def of_first_rank(mb: Microbatch) -> torch.Tensor:
        return right(mb) - mb.local_slice.start // mb.num_samples

    right = Microbatch.token_ids
    return mock.patch.object(Microbatch, "token_ids", of_first_rank)


BUGS: dict[str, tuple[str, Callable[[Trainer], Any]]] = {
    "reduce_scatter left out": ("dp4", skip_reduce_scatter),
    "token block dropped": ("dp4", drop_a_token_block),
    "stale parameters": ("dp4", stale_parameters),
    "token sums left apart": ("tp2,sp", skip_all_reduce),
    "tied table left apart": ("pp2", skip_all_reduce),
    "tp sum left out": ("tp2", skip_sum_over_tp),
    "dropout of other tokens": ("tp2,sp", wrong_token_slice),
}


class Player:
    """One rank's way through the cases; ``how`` goes to ``tiny_scenario``."""

    def __init__(self, folder: Path, rank: int, **how: Any):
        self._folder = folder
        self._rank = rank
        self._how = how
        self._num_worlds = 0

    def trainer(self, layout: str, bucket_numel: int | None = None, **how: Any) -> Trainer:
        """At the start of a run."""
        return Trainer(tiny_scenario(layout, **self._how | how), bucket_numel)

    @contextmanager
    def world(self, layout: str) -> Iterator[bool]:
        """A default process group of the layout's ranks; whether this rank is one of them."""
        num_ranks = Layout.parse(layout).world_size
        self._num_worlds += 1
        if self._rank >= num_ranks:
            yield False
            return
        store = dist.FileStore(str(self._folder / f"store{self._num_worlds}"), num_ranks)
        dist.init_process_group("primitives", store=store, rank=self._rank, world_size=num_ranks)
        yield True
        dist.barrier()
        dist.destroy_process_group()

    def write(self, name: str, metrics: Metrics) -> None:
        """For the test to read."""
        if self._rank == 0:
            (self._folder / f"{name}.json").write_text(json.dumps(metrics))

    def train(self, name: str, layout: str, bucket_numel: int | None = None, **how: Any) -> None:
        """From the start to the end."""
        with self.world(layout) as inside:
            if inside:
                self.write(name, play(self.trainer(layout, bucket_numel, **how), NUM_STEPS))

    def save(self, layout: str) -> None:
        """The first half, then a checkpoint."""
        with self.world(layout) as inside:
            if inside:
                trainer = self.trainer(layout)
                manager = CheckpointManager(self._folder / f"saved {layout}")
                play(trainer, SAVED_AT)
                trainer.state.save(manager, asynchronous=True)
                manager.wait()

    def resume(self, saved: str, layout: str) -> None:
        """The second half."""
        with self.world(layout) as inside:
            if inside:
                trainer = self.trainer(layout)
                trainer.state.load(CheckpointManager(self._folder / f"saved {saved}"))
                metrics = play(trainer, NUM_STEPS - SAVED_AT)
                self.write(f"{saved} resumed at {layout}", metrics)

    def err(self, bug: str) -> None:
        """From the start with a bug."""
        layout, inject = BUGS[bug]
        with self.world(layout) as inside:
            if inside:
                trainer = self.trainer(layout)
                with inject(trainer):
                    try:
                        self.write(bug, play(trainer, NUM_STEPS))
                    except ReplicasDiffer as error:
                        self.write(bug, [{"error": str(error)}])


def main(folder: str, rank: str) -> None:
    """The life of a rank."""
    torch.set_num_threads(1)
    backend.register()
    player = Player(Path(folder), int(rank))
    for layout in LAYOUTS:
        player.train(layout, layout)
    player.train("no overlap, one bucket per parameter", "tp2,dp2", 1, overlap=False)
    for layout in ("dp1", "dp4", "pp4"):
        player.train(f"{layout} of 4 microbatches", layout, micro_batch_size=4)
    player.train("dp1 of 1 microbatch", "dp1", micro_batch_size=16)
    player.train("tp2,pp4,sp of 1 microbatch", "tp2,pp4,sp", micro_batch_size=16)
    for saved in SAVED:
        player.save(saved)
        for layout in SAVED:
            if layout != saved:
                player.resume(saved, layout)
    for bug in BUGS:
        player.err(bug)
