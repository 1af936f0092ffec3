"""Parameter names and optimizer groups: what wraps the model, and how, leaves no trace in them.

Settings (learning rate, weight decay and so on) are stored per group together with the names of the
group's parameters; a load looks up every parameter's settings by its name, so groups may be
reordered, split, or joined where their settings agree.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import _get_fqns


def parameter_names(model: torch.nn.Module) -> dict[torch.Tensor, list[str]]:
    """Every parameter with its name (a flat one with all names inside), wrappers left out."""
    return {
        parameter: sorted(_get_fqns(model, name)) for name, parameter in model.named_parameters()
    }


def tied_parameters(model: torch.nn.Module) -> dict[str, str]:
    """Each further name of a shared parameter, and the name under which the optimizer knows it."""
    first: dict[torch.nn.Parameter, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for clean in _get_fqns(model, name):
            if first.setdefault(parameter, clean) != clean and "_flat_param" not in name:
                tied[clean] = first[parameter]
    return tied


def groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups: the settings, and the sorted names of the parameters.

    Raises:
        ValueError: the optimizer holds a parameter that is not the model's.
    """
    names = parameter_names(model)
    described = []
    for number, group in enumerate(optimizer.param_groups):
        strangers = [tuple(p.shape) for p in group["params"] if p not in names]
        if strangers:
            raise ValueError(
                f"optimizer group {number}: {len(strangers)} parameters are not the model's, the "
                f"first of shape {list(strangers[0])}; make the optimizer after wrapping"
            )
        described.append(
            {
                "parameters": sorted(name for p in group["params"] for name in names[p]),
                "settings": {name: group[name] for name in group if name != "params"},
            }
        )
    return described


def matched_settings(
    saved: Sequence[dict[str, Any]], live: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The saved settings of each live group (both as ``groups`` gives them), found by names.

    Raises:
        ValueError: a parameter is missing on one side, or one group now holds parameters that
            were saved with different settings.
    """
    by_name = {name: group["settings"] for group in saved for name in group["parameters"]}
    wanted = {name for group in live for name in group["parameters"]}
    if surplus := sorted(by_name.keys() - wanted) + sorted(wanted - by_name.keys()):
        raise ValueError(
            f"optimizer: parameter {surplus[0]!r} is only in the "
            f"{'checkpoint' if surplus[0] in by_name else 'training state'} "
            f"({len(surplus)} such parameters)"
        )
    matched = []
    for number, group in enumerate(live):
        names = group["parameters"]
        if not names:
            matched.append(group["settings"])
            continue
        settings = by_name[names[0]]
        for name in names[1:]:
            if repr(by_name[name]) != repr(settings):
                raise ValueError(
                    f"optimizer group {number}: {names[0]!r} was saved with {settings}, {name!r} "
                    f"with {by_name[name]}; expected equal settings within a group"
                )
        matched.append(settings)
    return matched


def set_settings(optimizer: torch.optim.Optimizer, settings: Sequence[dict[str, Any]]) -> None:
    """Puts settings into the groups; a tensor (a capturable learning rate) keeps its identity."""
    for group, saved in zip(optimizer.param_groups, settings, strict=True):
        for name, value in saved.items():
            if isinstance(group.get(name), torch.Tensor) and isinstance(value, torch.Tensor):
                group[name].copy_(value)
            else:
                group[name] = value
