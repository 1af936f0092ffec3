"""FSDPCheckpointManager: model, optimizer, schedule and random states of one training run."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from primitives.checkpoint import CheckpointManager
from primitives.checkpoint.chunks import leaves
from primitives.random_state import random_state, set_random_state


class FSDPCheckpointManager:
    """Checkpoints everything a replay needs; keys are parameter names, never indices.

    The model may be wrapped by FSDP1, FSDP2 (``fully_shard``), DDP or nothing: the keys and the
    global tensors are the same. All methods are collective.

    Args:
        root: folder of the checkpoints, shared by all ranks.
        model: the wrapped module.
        optimizer: its optimizer, made after wrapping; None to leave it out.
        lr_scheduler: its schedule; None to leave it out.
        process_group, keep: as in ``CheckpointManager``.
    """

    def __init__(
        self,
        root: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        keep: int | None = None,
    ) -> None:
        self.checkpoints = CheckpointManager(root, process_group=process_group, keep=keep)
        self._model = model
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        initialized = dist.is_available() and dist.is_initialized()
        self._rank = dist.get_rank(process_group) if initialized else 0
        self._world_size = dist.get_world_size(process_group) if initialized else 1

    def save(
        self, step: int, extras: dict[str, Any] | None = None, *, asynchronous: bool = False
    ) -> None:
        """Saves the training state as the checkpoint of a step.

        Args:
            step: number of finished steps.
            extras: plain values to keep beside it, equal on all ranks.
            asynchronous: as in ``CheckpointManager.save``.

        Raises:
            ValueError, CheckpointSaveFailed: as ``CheckpointManager.save``.
        """
        # A fresh optimizer has no moments. Asking torch for them would take a step to make some.
        with_moments = self._optimizer is not None and bool(self._optimizer.state)
        state = self._state(with_moments)
        # In a list: one entry, so that a load need not know what is inside.
        state["extras"] = [extras or {}]
        if self._lr_scheduler is not None:
            state["lr_scheduler"] = [self._lr_scheduler.state_dict()]
        self.checkpoints.save(step, state, asynchronous=asynchronous)

    def load(self, step: int | None = None) -> tuple[int, dict[str, Any]]:
        """Brings model, optimizer, schedule and random states back; gradients are dropped.

        Args:
            step: which checkpoint; None for the one saved last.

        Returns:
            The step and its extras.

        Raises:
            FileNotFoundError, CheckpointCorrupt: as ``CheckpointManager.load``.
            ValueError: the checkpoint has keys that the training state lacks, or the reverse, or
                other dtypes or shapes, or was saved by another number of ranks.
        """
        self.checkpoints.wait()
        chosen = self.checkpoints.latest() if step is None else step
        if chosen is None:
            raise FileNotFoundError("no checkpoint to load")
        stored = self.checkpoints.keys(chosen)
        self._check_world_size(stored)
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        with_moments = any(key.startswith("optimizer/state/") for key in stored)
        state = self._state(with_moments)
        state["extras"] = None
        if self._lr_scheduler is not None:
            state["lr_scheduler"] = None
        self._check_keys(stored, state)
        self.checkpoints.load(state, chosen)

        set_model_state_dict(self._model, state["model"])
        if self._optimizer is not None:
            self._set_optimizer(self._optimizer, state["optimizer"], with_moments)
        if self._lr_scheduler is not None:
            self._lr_scheduler.load_state_dict(state["lr_scheduler"][0])
        set_random_state(state["random"][self._rank_key])
        extras: dict[str, Any] = state["extras"][0]
        return chosen, extras

    def wait(self) -> None:
        """Returns when the pending asynchronous save is on the disk; raises its error."""
        self.checkpoints.wait()

    @property
    def _rank_key(self) -> str:
        return f"rank_{self._rank:05d}"

    def _state(self, with_moments: bool) -> dict[str, Any]:
        """The state as it is now; its tensors are also the targets of a load."""
        state: dict[str, Any] = {
            "model": get_model_state_dict(self._model),
            "random": {self._rank_key: random_state()},
        }
        if self._optimizer is not None:
            optimizer: dict[str, Any] = {
                "param_groups": {
                    str(number): {name: group[name] for name in group if name != "params"}
                    for number, group in enumerate(self._optimizer.param_groups)
                }
            }
            if with_moments:
                moments = get_optimizer_state_dict(self._model, self._optimizer)["state"]
                optimizer["state"] = moments
            state["optimizer"] = optimizer
        return state

    def _set_optimizer(
        self, optimizer: torch.optim.Optimizer, loaded: dict[str, Any], with_moments: bool
    ) -> None:
        if with_moments:
            complete = get_optimizer_state_dict(self._model, optimizer)
            complete["state"] = loaded["state"]
            set_optimizer_state_dict(self._model, optimizer, complete)
        else:
            optimizer.state.clear()
        for number, group in enumerate(optimizer.param_groups):
            group.update(loaded["param_groups"][str(number)])

    def _check_world_size(self, stored: set[str]) -> None:
        ranks = {key.split("/")[1] for key in stored if key.startswith("random/")}
        if len(ranks) != self._world_size:
            raise ValueError(
                f"checkpoint of {len(ranks)} ranks, expected {self._world_size}: each rank "
                "continues with its own random state"
            )

    def _check_keys(self, stored: set[str], state: dict[str, Any]) -> None:
        wanted = {leaf.key for leaf in leaves(state)}
        others = {key for key in stored if key.startswith("random/")}
        if self._optimizer is None:
            others |= {key for key in stored if key.startswith("optimizer/")}
        if self._lr_scheduler is None:
            others.add("lr_scheduler")
        surplus, missing = sorted(stored - wanted - others), sorted(wanted - stored)
        if surplus or missing:
            raise ValueError(
                f"checkpoint and training state differ: only in the checkpoint {surplus[:5]} "
                f"({len(surplus)} keys), only in the training state {missing[:5]} "
                f"({len(missing)} keys)"
            )
