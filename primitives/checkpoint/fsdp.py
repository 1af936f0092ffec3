"""FSDPCheckpointManager: model, optimizer, schedule, data and random states of a training run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from primitives.checkpoint.chunks import leaves
from primitives.checkpoint.exchange import agree
from primitives.checkpoint.export import export_hf
from primitives.checkpoint.groups import groups, matched_settings, set_settings, tied_parameters
from primitives.checkpoint.manager import CheckpointManager
from primitives.checkpoint.moments import check_gatherable, moments, targets
from primitives.checkpoint.reader import Contents
from primitives.random_state import random_state, reseed, set_random_state


class Stateful(Protocol):
    """Such as torchdata's StatefulDataLoader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class FSDPCheckpointManager:
    """Checkpoints everything a replay needs; keys are parameter names, never indices.

    The model may be wrapped by FSDP1, FSDP2 (``fully_shard``), DDP or nothing: the keys and the
    global tensors are the same, so that a checkpoint of one loads into any other, on any number of
    ranks. All methods are collective.

    Args:
        root: folder of the checkpoints, shared by all ranks.
        model: the wrapped module.
        optimizer: its optimizer, made after wrapping; None to leave it out.
        lr_scheduler: its schedule; None to leave it out.
        data_loader: this rank's source of batches, such as a StatefulDataLoader; None to leave it
            out.
        asynchronous: how ``save`` works unless told: True for in the background. From the
            optimizer's first step on the memory of the copies is made ready meanwhile, so that the
            first save blocks no longer than the next.
        process_group, keep: as in ``CheckpointManager``.

    Raises:
        ValueError: moments of FSDP1 on a sub-group before torch 2.13; ``asynchronous`` on a
            sub-group.
    """

    def __init__(
        self,
        root: Path,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        data_loader: Stateful | None = None,
        *,
        asynchronous: bool = False,
        process_group: dist.ProcessGroup | None = None,
        keep: int | None = None,
    ) -> None:
        self.checkpoints = CheckpointManager(root, process_group=process_group, keep=keep)
        self._exchange = self.checkpoints.exchange
        self._model = model
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._data_loader = data_loader
        self._asynchronous = asynchronous
        if optimizer is not None:
            check_gatherable(model, self._exchange.world_size)
        if asynchronous:
            self.checkpoints.check_asynchronous()
            self._reserve_when_complete()

    def save(
        self,
        step: int,
        extras: dict[str, Any] | None = None,
        *,
        asynchronous: bool | None = None,
    ) -> None:
        """Saves the training state as the checkpoint of a step.

        Args:
            step: number of finished steps.
            extras: small values to keep beside it (``plain_values.encode``), equal on all ranks.
            asynchronous: as in ``CheckpointManager.save``; None as the manager was made.

        Raises:
            ValueError, CheckpointSaveFailed: as ``CheckpointManager.save``.
        """
        state = self._model_and_random()
        # Lists are one entry each, so that a load need not know what is inside.
        state["world_size"] = self._exchange.world_size
        state["extras"] = [extras or {}]
        state["tied"] = [tied_parameters(self._model)]
        if (optimizer := self._optimizer) is not None:
            described = agree(self._exchange, lambda: groups(self._model, optimizer))[0]
            found = moments(self._model, optimizer, self._exchange)
            names = {name for group in described for name in group["parameters"]}
            state["optimizer"] = {
                "groups": described,
                "state": found,
                "stateless": sorted(names - found.keys()),
            }
        if self._lr_scheduler is not None:
            state["lr_scheduler"] = [self._lr_scheduler.state_dict()]
        if self._data_loader is not None:
            state["data_loader"] = {self._rank_key: [self._data_loader.state_dict()]}
        if asynchronous is None:
            asynchronous = self._asynchronous
        self.checkpoints.save(step, state, asynchronous=asynchronous)

    def load(
        self,
        step: int | None = None,
        *,
        reshard_data: Callable[[list[Any]], dict[str, Any]] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Brings the whole training state back; gradients are dropped.

        On as many ranks as saved it, every rank gets its own random and data loader states back. On
        another number of ranks the random generators are seeded anew from the saved states
        (``random_state.reseed``), and a data loader needs ``reshard_data``.

        Args:
            step: which checkpoint; None for the one saved last.
            reshard_data: makes this rank's data loader state from those of all ranks that saved, by
                rank. Called only when the number of ranks has changed.

        Returns:
            The step and its extras.

        Raises:
            FileNotFoundError, CheckpointCorrupt: as ``CheckpointManager.load``.
            ValueError: the checkpoint has keys, parameters or groups that the training state lacks,
                or the reverse, or other dtypes or shapes; or a data loader and another number of
                ranks without ``reshard_data``. Nothing was changed, but gradients.
        """
        self.checkpoints.wait()
        source = self._open(step, reshard_data)
        state = self._model_and_random()
        random = state.pop("random")[self._rank_key]
        if f"random/{source.random_key}/cuda" not in source.contents.tensors:
            random.pop("cuda", None)
        state["random"] = {source.random_key: random}
        place = None
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
            place = targets(self._model, self._optimizer, source.stateful)
            state["optimizer"] = {"state": place.moments}
        try:
            agree(self._exchange, lambda: self._check_keys(source.contents, state))
            self.checkpoints.load(state, source.step)
        except Exception:
            if place is not None:
                place.undo()
            raise

        set_model_state_dict(self._model, state["model"])
        if self._optimizer is not None and place is not None:
            place.commit()
            set_settings(self._optimizer, source.settings)
        if self._lr_scheduler is not None:
            self._lr_scheduler.load_state_dict(source.contents.values["lr_scheduler"][0])
        if self._data_loader is not None:
            self._data_loader.load_state_dict(source.data_state)
        if source.resized:
            reseed(random, self._exchange.rank, self._exchange.world_size)
        else:
            set_random_state(random)
        extras: dict[str, Any] = source.contents.values["extras"][0]
        return source.step, extras

    def wait(self) -> None:
        """Returns when the pending asynchronous save is on the disk; raises its error."""
        self.checkpoints.wait()

    def export_hf(
        self, target: Path, step: int | None = None, *, max_shard_nbytes: int = 5_000_000_000
    ) -> list[str]:
        """Writes a checkpoint's model as Hugging Face safetensors, with its config if it has one.

        Args:
            target, step, max_shard_nbytes: as in ``export.export_hf``.

        Returns, Raises: as ``export.export_hf``.
        """
        self.checkpoints.wait()

        def export() -> list[str]:
            if self._exchange.rank:
                return []
            files = export_hf(
                self.checkpoints.root, target, step, max_shard_nbytes=max_shard_nbytes
            )
            config = getattr(self._model, "config", None)
            if config is None:  # DDP does not pass attributes on
                config = getattr(getattr(self._model, "module", None), "config", None)
            if config is not None and hasattr(config, "save_pretrained"):
                config.save_pretrained(target)
            return files

        return agree(self._exchange, export)[0]

    def _reserve_when_complete(self) -> None:
        """Reserves the memory of saves once the optimizer has its moments."""
        optimizer = self._optimizer
        if optimizer is None or optimizer.state:
            self._reserve()
            return

        def first_step_done(*_: Any) -> None:
            handle.remove()
            self._reserve()

        handle = optimizer.register_step_post_hook(first_step_done)

    def _reserve(self) -> None:
        values = [*self._model.parameters(), *self._model.buffers()]
        values += [leaf.value for leaf in leaves(random_state())]
        if self._optimizer is not None:
            values += [
                value for state in self._optimizer.state.values() for value in state.values()
            ]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        nbytes = sum(
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
            for tensor in tensors
        )
        # A sixteenth more: the pieces are aligned, and FSDP1 gathers moments to even shards.
        pinned = any(tensor.is_cuda for tensor in tensors)
        self.checkpoints.reserve(nbytes + nbytes // 16, pinned=pinned)

    @property
    def _rank_key(self) -> str:
        return f"rank_{self._exchange.rank:05d}"

    def _model_and_random(self) -> dict[str, Any]:
        """The state as it is now; its tensors are also the targets of a load."""
        return {
            "model": get_model_state_dict(self._model),
            "random": {self._rank_key: random_state()},
        }

    def _open(
        self, step: int | None, reshard_data: Callable[[list[Any]], dict[str, Any]] | None
    ) -> "_Source":
        """Reads what is known without the tensors; all ranks choose the same step."""
        latest = agree(self._exchange, self.checkpoints.latest if step is None else lambda: step)
        if latest[0] is None:
            raise FileNotFoundError(f"{self.checkpoints.root.path}: no checkpoint to load")
        chosen: int = latest[0]
        sources: list[_Source] = []

        def read() -> None:
            contents = self.checkpoints.contents(chosen)
            sources.append(self._source(chosen, contents, reshard_data))

        agree(self._exchange, read)
        return sources[0]

    def _source(
        self,
        step: int,
        contents: Contents,
        reshard_data: Callable[[list[Any]], dict[str, Any]] | None,
    ) -> "_Source":
        values = contents.values
        world_size: int = values.get("world_size", 0)
        resized = world_size != self._exchange.world_size
        source = _Source(step, contents, resized, "rank_00000" if resized else self._rank_key)
        needed = {
            "world_size": True,
            "optimizer/groups": self._optimizer is not None,
            "lr_scheduler": self._lr_scheduler is not None,
            "data_loader/rank_00000": self._data_loader is not None,
        }
        if missing := [key for key, wanted in needed.items() if wanted and key not in values]:
            raise ValueError(f"checkpoint of step {step} has no {missing[0]!r}")
        if self._optimizer is not None:
            saved = values["optimizer/groups"]
            live = groups(self._model, self._optimizer)
            source.settings = matched_settings(saved, live)
            names = [[group["parameters"] for group in described] for described in (saved, live)]
            if self._lr_scheduler is not None and names[0] != names[1]:
                raise ValueError(
                    "lr scheduler: its learning rates belong to optimizer groups, and the groups "
                    f"are others than were saved ({len(saved)} saved, {len(live)} now)"
                )
            every = {name for group in names[0] for name in group}
            source.stateful = every - set(values["optimizer/stateless"])
        if self._data_loader is not None:
            keys = [f"data_loader/rank_{rank:05d}" for rank in range(world_size)]
            states = [values[key][0] for key in keys]
            if not resized:
                source.data_state = states[self._exchange.rank]
            elif reshard_data is not None:
                source.data_state = reshard_data(states)
            else:
                raise ValueError(
                    f"data loader states of {world_size} ranks, expected "
                    f"{self._exchange.world_size}; pass reshard_data to make new ones of them"
                )
        return source

    def _check_keys(self, contents: Contents, state: dict[str, Any]) -> None:
        sections = ("model/",) if self._optimizer is None else ("model/", "optimizer/state/")
        stored = {key for key in contents.names() if key.startswith(sections)}
        wanted = {leaf.key for leaf in leaves(state) if leaf.key.startswith(sections)}
        surplus, missing = sorted(stored - wanted), sorted(wanted - stored)
        if surplus or missing:
            raise ValueError(
                f"checkpoint and training state differ: only in the checkpoint {surplus[:5]} "
                f"({len(surplus)} keys), only in the training state {missing[:5]} "
                f"({len(missing)} keys)"
            )


@dataclass
class _Source:
    """A checkpoint to load from, as this rank sees it."""

    step: int
    contents: Contents
    resized: bool
    random_key: str
    settings: list[dict[str, Any]] = field(default_factory=list)
    stateful: set[str] = field(default_factory=set)
    data_state: dict[str, Any] = field(default_factory=dict)
