"""What a checkpoint holds, and the proof that a load gave it back.

Main parameters and moments are saved one entry per leaf (parameter, canonical block, slice), so
that any layout can load them: each rank asks for its own leaves, whichever ranks saved them. The
digests of all entries are saved beside them; after a load the live tensors are hashed again, where
the next step will read them.
"""

import json
from typing import Any

import torch
from torch import Tensor

from primitives.checkpoint import CheckpointManager
from primitives.errors import CheckpointCorrupt
from primitives.rank_group import RankGroup
from scenarios.parallel.distributed_optimizer import DistributedOptimizer
from scenarios.parallel.loss_scaler import LossScaler
from scenarios.parallel.lr_schedule import LearningRateSchedule
from scenarios.schema import Scenario

KINDS = ("main", "exp_avg", "exp_avg_sq")


class TrainingState:
    """Progress of a run, saved and loaded together with the optimizer it watches.

    Args:
        scenario: goes into the checkpoint, so that no other model can continue it.
        optimizer: its shards are saved and, at load, filled in place.
        scaler: loss scale.
        schedule: learning rate.
        world: all ranks.
    """

    def __init__(
        self,
        scenario: Scenario,
        optimizer: DistributedOptimizer,
        scaler: LossScaler,
        schedule: LearningRateSchedule,
        world: RankGroup,
    ):
        self.step = 0
        self.consumed_samples = 0
        """The data position: the first sample of the next step."""
        self._scenario = scenario
        self._optimizer = optimizer
        self._scaler = scaler
        self._schedule = schedule
        self._world = world

    def count_step(self) -> None:
        """One more step is done; a skipped one has consumed its samples, too."""
        self.step += 1
        self.consumed_samples += self._scenario.training.global_batch_size

    def progress(self) -> dict[str, Any]:
        """Every live number besides the tensors; seed and counters are the whole RNG state."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "num_updates": self._optimizer.num_updates,
            "schedule_samples": self._schedule.num_samples,
            "loss_scaler": self._scaler.state(),
            "rng": {"seed": self._scenario.training.seed, "next_sample": self.consumed_samples},
        }

    def save(self, manager: CheckpointManager, *, asynchronous: bool) -> None:
        """Saves under the current step; with ``asynchronous`` files are written in background."""
        state: dict[str, Any] = _on_host(self._tensors())
        state["digests"] = {kind: self.digests(kind) for kind in KINDS}
        state["progress"] = json.dumps(self.progress(), sort_keys=True)
        state["scenario"] = json.dumps(self._identity(), sort_keys=True)
        manager.save(self.step, state, asynchronous=asynchronous)

    def load(self, manager: CheckpointManager) -> None:
        """Loads the newest checkpoint and compares all live state with what was saved.

        Raises:
            ValueError: there is no checkpoint, or it is of another scenario.
            CheckpointCorrupt: a tensor or number differs after the load; the message names it.
        ReplicasDiffer: two ranks loaded different bits of one entry.
        """
        latest = manager.latest()
        if latest is None:
            raise ValueError("nothing to resume from: the checkpoint folder has no checkpoint")
        header: dict[str, Any] = {"scenario": "", "progress": ""}
        manager.load(header, latest)
        self._check_identity(json.loads(header["scenario"]), latest)

        live_tensors = self._tensors()
        state: dict[str, Any] = _on_host(live_tensors)
        num_leaves = len(self._optimizer.leaves.names)
        state["digests"] = {kind: torch.empty(num_leaves, 32, dtype=torch.uint8) for kind in KINDS}
        manager.load(state, latest)
        for kind, by_name in live_tensors.items():
            for name, tensor in by_name.items():
                if tensor is not state[kind][name]:
                    tensor.copy_(state[kind][name])
        for kind, saved_digests in state["digests"].items():
            self._check_digests(kind, saved_digests, latest)

        saved = json.loads(header["progress"])
        self.step = saved["step"]
        self.consumed_samples = saved["consumed_samples"]
        self._optimizer.set_num_updates(saved["num_updates"])
        self._schedule.num_samples = saved["schedule_samples"]
        self._scaler.load(saved["loss_scaler"])
        live = self.progress()
        wrong = [name for name in saved.keys() | live.keys() if saved.get(name) != live.get(name)]
        if wrong or self.step != latest:
            raise CheckpointCorrupt(
                f"checkpoint of step {latest}: {', '.join(sorted(wrong)) or 'step'} differs after "
                f"the load: saved {saved}, live {live}"
            )

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """kind -> entry name -> live slice of this rank, [slice numel] fp32."""
        optimizer = self._optimizer
        return {
            kind: {
                name: leaf
                for shard, run in zip(optimizer.shards, optimizer.runs, strict=True)
                for name, leaf in zip(
                    run.names(), getattr(shard, kind).flatten(0, 1).unbind(), strict=True
                )
            }
            for kind in KINDS
        }

    def digests(self, kind: str) -> Tensor:
        """Of the live state: [all leaves, 32] uint8 in sorted order, equal on all ranks."""
        leaves = self._optimizer.leaves
        gathered = self._world.all_gather(leaves.pad(self._optimizer.digest_leaves(kind))[None])
        leaves.check_replicas(gathered, kind)
        return leaves.sort(gathered)

    def _check_digests(self, kind: str, saved: Tensor, step: int) -> None:
        wrong = (self.digests(kind) != saved).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            names = self._optimizer.leaves.names
            raise CheckpointCorrupt(
                f"checkpoint of step {step}: {kind} of {names[wrong[0]]} differs after the load "
                f"from what was saved ({len(wrong)} of {len(names)} entries of {kind} differ)"
            )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a run to continue; the layout may change."""
        scenario = self._scenario
        sections = {
            "model": scenario.model,
            "training": scenario.training,
            "data": scenario.data,
        }
        identity = {
            f"{section}.{name}": value
            for section, config in sections.items()
            for name, value in config.model_dump(mode="json").items()
        }
        # A run may train longer than the one that saved.
        del identity["training.train_iters"]
        return {"family": scenario.family, **identity}

    def _check_identity(self, saved: dict[str, Any], step: int) -> None:
        live = self._identity()
        wrong = sorted(n for n in saved.keys() | live.keys() if saved.get(n) != live.get(n))
        if wrong:
            raise ValueError(
                f"checkpoint of step {step} is of another scenario: "
                + "; ".join(f"{n} was {saved.get(n)}, is {live.get(n)}" for n in wrong)
            )


def _on_host(tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The tensors themselves if they are on the CPU, else copies."""
    return {
        kind: {name: tensor.cpu() for name, tensor in by_name.items()}
        for kind, by_name in tensors.items()
    }
