"""An optimizer's moments by parameter name and kind, as global tensors.

FSDP2, DDP and plain modules keep a moment beside its parameter, sharded alike: the live tensors
are what is saved, and what a load fills. FSDP1 keeps moments of flat pieces, which torch gathers
into sharded tensors and takes apart again; it wants moments of every parameter, also of those that
never had a gradient.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    _init_optim_state,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from primitives.checkpoint.exchange import Exchange
from primitives.checkpoint.groups import parameter_names

Moments = dict[str, dict[str, Any]]


def check_gatherable(model: torch.nn.Module, world_size: int) -> None:
    """Refuses what torch cannot gather: before 2.13 it gathers FSDP1's moments over all ranks.

    Raises:
        ValueError: FSDP1 on ``world_size`` ranks of a job that has more.
    """
    if torch.__version__ >= "2.13" or not _is_fsdp1(model):
        return
    if world_size < dist.get_world_size():
        raise ValueError(
            f"FSDP1 with an optimizer on {world_size} of {dist.get_world_size()} ranks needs torch "
            f"2.13 or newer, got {torch.__version__}: before, torch gathers its moments over all "
            "ranks; take FSDP2 (fully_shard) or all ranks"
        )


def moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ranks: Exchange) -> Moments:
    """Parameter name -> kind -> live tensor, without parameters that have none. Collective."""
    names = parameter_names(model)
    held = {name for parameter in optimizer.state for name in names[parameter]}
    anywhere = set().union(*ranks.all_gather(held))
    if not _is_fsdp1(model):
        return {
            name: optimizer.state[parameter]
            for parameter in optimizer.state
            for name in names[parameter]
        }
    if not anywhere:  # torch would take a step to make some
        return {}
    stand_ins = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not anywhere.intersection(names[parameter])
    ]
    if optimizer.state:
        owner, kinds = next(iter(optimizer.state.items()))
        for parameter in stand_ins:
            optimizer.state[parameter] = _like(owner, kinds, parameter)
    gathered: Any = get_optimizer_state_dict(model, optimizer)["state"]
    for parameter in stand_ins:
        optimizer.state.pop(parameter, None)
    return {name: kinds for name, kinds in gathered.items() if name in anywhere}


@dataclass
class Targets:
    """Where a load puts moments."""

    moments: Moments
    """to be filled in place"""
    commit: Callable[[], None]
    """makes them the optimizer's; collective"""
    undo: Callable[[], None]
    """leaves the optimizer as it was"""


def targets(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, wanted: Collection[str]
) -> Targets:
    """Targets for the moments of some parameters; the others will have none. Collective.

    The gradients must be None.

    Args:
        wanted: parameter names.
    """
    kept = dict(optimizer.state)

    def undo() -> None:
        optimizer.state.clear()
        optimizer.state.update(kept)

    names = parameter_names(model)
    if _is_fsdp1(model) and wanted:
        optimizer.state.clear()
        complete: dict[str, Any] = get_optimizer_state_dict(model, optimizer)

        def take_apart() -> None:
            set_optimizer_state_dict(model, optimizer, complete)
            for parameter in [p for p in optimizer.state if not set(names[p]) & set(wanted)]:
                del optimizer.state[parameter]

        found = {name: kinds for name, kinds in complete["state"].items() if name in wanted}
        return Targets(found, take_apart, undo)

    by_name = {name: parameter for parameter in names for name in names[parameter]}
    if any(by_name.get(name) not in kept for name in wanted):
        optimizer.state.clear()
        _init_optim_state(optimizer)
        blank = dict(optimizer.state)
        undo()
        kept_or_blank = blank | kept
    else:
        kept_or_blank = kept
    found = {
        name: dict(kept_or_blank[by_name[name]])
        for name in wanted
        if by_name.get(name) in kept_or_blank
    }

    def replace() -> None:
        optimizer.state.clear()
        optimizer.state.update({by_name[name]: kinds for name, kinds in found.items()})

    return Targets(found, replace, undo)


def _is_fsdp1(model: torch.nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _like(owner: torch.Tensor, kinds: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """Zero moments for ``parameter`` of the kinds that ``owner`` has."""
    return {
        kind: torch.zeros_like(parameter, dtype=value.dtype)
        if isinstance(value, torch.Tensor) and value.shape == owner.shape
        else value
        for kind, value in kinds.items()
    }
