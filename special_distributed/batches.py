"""Random batches: nested, jagged and empty, of any dtype, with object columns."""

from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from primitives.sharded_tensordict import ShardedTensorDict

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
KEYS = ("a", "b", ("nested", "c"), ("nested", "deeper", "d"), "e")


class LeafPlan(NamedTuple):
    """What a leaf looks like, whatever the rows."""

    dtype: torch.dtype
    row_shape: tuple[int, ...]
    jagged: bool


Plan = dict[Any, LeafPlan]
"""key -> leaf"""

leaf_plans = st.builds(
    LeafPlan,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=2).map(tuple),
    st.booleans(),
)
plans = st.dictionaries(st.sampled_from(KEYS), leaf_plans, max_size=len(KEYS))
summable_plans = plans.map(
    lambda plan: {
        key: leaf._replace(jagged=False)
        for key, leaf in plan.items()
        if leaf.dtype is not torch.complex64
    }
)
"""plans whose leaves have a sum and a maximum"""
counts = st.tuples(*[st.integers(0, 4)] * 4)
"""rows of each of four ranks"""


def random_bits(generator: np.random.Generator, shape: Any, dtype: torch.dtype) -> Tensor:
    """A tensor of any bits, NaNs and infinities among them."""
    if dtype is torch.bool:
        return torch.from_numpy(generator.integers(0, 2, shape, dtype=np.uint8)).bool()
    tensor = torch.empty(shape, dtype=dtype)
    raw = generator.integers(0, 256, tensor.numel() * dtype.itemsize, dtype=np.uint8)
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(raw))
    return tensor


def batch_of(plan: Plan, num_rows: int, seed: int) -> ShardedTensorDict:
    """The same on every rank that asks for it."""
    generator = np.random.default_rng(seed)
    tensors = TensorDict({}, batch_size=[num_rows])
    for key, (dtype, row_shape, jagged) in plan.items():
        if jagged:
            lengths = torch.from_numpy(generator.integers(0, 4, num_rows))
            values = random_bits(generator, (int(lengths.sum()), *row_shape), dtype)
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            tensors[key] = torch.nested.nested_tensor_from_jagged(values, offsets)
        else:
            tensors[key] = random_bits(generator, (num_rows, *row_shape), dtype)
    columns = {
        "text": [f"{seed}.{row}" for row in range(num_rows)],
        "lists": [[seed] * row for row in range(num_rows)],
    }
    return ShardedTensorDict(tensors, columns, {"temperature": 0.5, "missing": float("nan")})


def contents(batch: Any) -> list[Any]:
    """The rows as plain values in which equality means equal bits."""
    tensors: dict[Any, list[Any]] = {}
    for key, leaf in batch.leaves().items():
        rows = leaf.unbind() if len(batch) else []
        tensors[key] = [
            (row.dtype, tuple(row.shape), row.contiguous().reshape(-1).view(torch.uint8).tolist())
            if row.numel()
            else (row.dtype, tuple(row.shape), [])
            for row in rows
        ]
    columns = {name: list(values) for name, values in batch.columns.items()}
    return [
        {key: rows[row] for key, rows in (tensors | columns).items()} for row in range(len(batch))
    ]
