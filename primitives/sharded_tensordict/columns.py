"""Python values, one a row; and what it means for two values to be equal."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

MetaPolicy = str | Callable[[list[dict[str, Any]]], dict[str, Any]]
"""How the meta of several batches becomes one: "equal" refuses differences, "first" takes that of
the first batch or rank, "gather" makes key -> list of all values, a function does what it likes."""


def object_column(values: Sequence[Any]) -> np.ndarray:
    """A one-dimensional object array, also of values that numpy would take apart."""
    column = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = value
    return column


def equal(a: Any, b: Any) -> bool:
    """By bits where possible (so NaN equals NaN), else by value; nothing is broadcast."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same_tensor(a, b)
    if pickle.dumps(a) == pickle.dumps(b):
        return True
    same_shape: bool = getattr(a, "shape", None) == getattr(b, "shape", None)
    return same_shape and bool(np.all(a == b))


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and values; NaN equals NaN, and -0.0 equals 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point() or a.is_complex():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def merge_meta(metas: Sequence[dict[str, Any]], policy: MetaPolicy, who: str) -> dict[str, Any]:
    """One meta of several.

    Args:
        metas: of the batches or ranks, in order.
        policy: see MetaPolicy.
        who: what one of them is called in an error: "rank" or "batch".

    Raises:
        ValueError: keys or values differ and the policy is "equal", or no such policy.
    """
    if callable(policy):
        return policy(list(metas))
    if policy == "first":
        return dict(metas[0])
    if policy == "gather":
        keys = dict.fromkeys(key for meta in metas for key in meta)
        return {key: [meta.get(key) for meta in metas] for key in keys}
    if policy != "equal":
        raise ValueError(f"meta: got {policy!r}, expected equal, first, gather or a function")
    for number, meta in enumerate(metas):
        if meta.keys() != metas[0].keys():
            differing = sorted(map(str, meta.keys() ^ metas[0].keys()))
            raise ValueError(f"meta: {who} {number} and {who} 0 differ in having {differing}")
        for key, value in meta.items():
            if not equal(value, metas[0][key]):
                raise ValueError(
                    f"meta {key}: {who} {number} has {value!r}, {who} 0 has {metas[0][key]!r}"
                )
    return dict(metas[0])
