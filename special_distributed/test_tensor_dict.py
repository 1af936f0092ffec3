"""The sharded batch, and entropy and log-probability over a split vocabulary, on a 2x2 mesh."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from primitives import vocab_parallel
from primitives.sharded_tensordict import ShardedTensorDict, equal
from special_distributed.examples import examples

NUM_TOKENS = 256
VOCAB = 155136


@pytest.fixture
def mesh(world: dist.ProcessGroup) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    same_kind = actual.dtype == expected.dtype and actual.shape == expected.shape
    return same_kind and torch.equal(bits(actual), bits(expected))


def batch_of(dp: int, num_rows: int) -> ShardedTensorDict:
    """A batch that is known on every rank; each row tells where it comes from."""
    generator = torch.Generator().manual_seed(dp)
    scores = torch.randn(num_rows, 5, generator=generator)
    scores[:, 0] = float("nan")
    tensors = TensorDict(
        {
            "ids": torch.arange(num_rows * 3).reshape(num_rows, 3) + 1000 * dp,
            "scores": scores,
            "mask": torch.arange(num_rows) % 2 == dp,
            "nested": {"half": scores[:, 1:].to(torch.bfloat16)},
        },
        batch_size=[num_rows],
    )
    columns: dict[str, Any] = {
        "prompt": [f"prompt {dp}.{row}" for row in range(num_rows)],
        "turns": [[dp] * row for row in range(num_rows)],
    }
    return ShardedTensorDict(tensors, columns, {"temperature": 0.7, "seed": 1})


@examples(10, rows=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_all_gather_concatenates_in_rank_order(
    mesh: DeviceMesh, rank: int, rows: tuple[int, int]
) -> None:
    mine = batch_of(mesh["dp"].get_local_rank(), rows[mesh["dp"].get_local_rank()])
    full = mine.all_gather(mesh, "dp")
    parts = [batch_of(dp, num_rows) for dp, num_rows in enumerate(rows)]
    assert len(full) == sum(rows)
    for key in ("ids", "scores", "mask", ("nested", "half")):
        expected = torch.cat([part.tensors[key] for part in parts])
        assert same_bits(full.tensors[key], expected), key
    for name in ("prompt", "turns"):
        assert full.columns[name].dtype == np.dtype(object)
        assert list(full.columns[name]) == [v for part in parts for v in part.columns[name]]
    assert full.meta == {"temperature": 0.7, "seed": 1}
    assert same_bits(mine.tensors["scores"], parts[mesh["dp"].get_local_rank()].tensors["scores"])


def test_the_order_of_keys_does_not_matter(mesh: DeviceMesh) -> None:
    dp = mesh["dp"].get_local_rank()
    values = {"a": torch.arange(3) + 10 * dp, "b": torch.arange(3) + 10 * dp + 100}
    if dp == 1:
        values = dict(reversed(values.items()))
    full = ShardedTensorDict(TensorDict(values, batch_size=[3])).all_gather(mesh, "dp")
    assert full.tensors["a"].tolist() == [0, 1, 2, 10, 11, 12]
    assert full.tensors["b"].tolist() == [100, 101, 102, 110, 111, 112]


def test_meta_that_broadcasts_is_not_equal() -> None:
    assert equal({"x": np.zeros(3)}, {"x": np.zeros(3)})
    assert not equal(np.zeros(3), 0.0)
    assert not equal(np.zeros(0), np.ones(1))
    assert not equal(torch.zeros(2, 2), torch.zeros(2))


def test_all_gather_refuses_what_does_not_fit(mesh: DeviceMesh, rank: int) -> None:
    dp = mesh["dp"].get_local_rank()
    batch = batch_of(dp, 2)
    batch.meta["seed"] = dp
    with pytest.raises(ValueError, match="meta seed: rank 1 has 1, rank 0 has 0"):
        batch.all_gather(mesh, "dp")
    batch = batch_of(dp, 2)
    if dp == 1:
        batch.tensors["ids"] = batch.tensors["ids"].int()
    with pytest.raises(ValueError, match=r"ids: rank 1 has torch\.int32 rows of shape \[3\]"):
        batch.all_gather(mesh, "dp")
    batch = batch_of(dp, 2)
    if dp == 1:
        del batch.columns["turns"]
    with pytest.raises(ValueError, match="rank 1 lacks turns"):
        batch.all_gather(mesh, "dp")


def test_columns_must_have_a_value_a_row() -> None:
    tensors = TensorDict({"x": torch.zeros(3)}, batch_size=[3])
    with pytest.raises(ValueError, match=r"column 'name': .* got 2 values for 3 rows"):
        ShardedTensorDict(tensors, {"name": ["a", "b"]})


def test_tensors_must_be_tensors_of_rows() -> None:
    tensors = TensorDict({"x": torch.zeros(3)}, batch_size=[3])
    tensors.set_non_tensor("name", "abc")
    with pytest.raises(ValueError, match="name is a NonTensorData; it belongs in columns or meta"):
        ShardedTensorDict(tensors)
    with pytest.raises(ValueError, match=r"batch_size must be \[rows\], got \[3, 2\]"):
        ShardedTensorDict(TensorDict({"x": torch.zeros(3, 2)}, batch_size=[3, 2]))


def logits_and_grad(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The full logits [tokens, vocab] with 64 padded columns, and a gradient [tokens]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(NUM_TOKENS, VOCAB, generator=generator).mul_(4).to(dtype)
    logits[:, -64:] = float("-inf")
    return logits, torch.randn(NUM_TOKENS, generator=generator)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        ("entropy", torch.float32),
        ("entropy", torch.bfloat16),
        ("log_prob", torch.float32),
    ],
)
def test_vocab_parallel_equals_unsharded(
    mesh: DeviceMesh, rank: int, function: str, dtype: torch.dtype
) -> None:
    tp = mesh["tp"]
    full, grad = logits_and_grad(mesh["dp"].get_local_rank(), dtype)
    targets = (torch.arange(NUM_TOKENS) * 7919) % (VOCAB - 64)

    def evaluate(
        logits: torch.Tensor, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        if function == "entropy":
            value = vocab_parallel.entropy(leaf, group)
        else:
            value = vocab_parallel.log_prob(leaf, targets, group)
        torch.autograd.backward(value, grad)
        assert same_bits(leaf.detach(), logits)  # unaltered
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    shard = full.chunk(2, dim=1)[tp.get_local_rank()]
    value, shard_grad = evaluate(shard, tp.get_group())
    full_value, full_grad = evaluate(full, None)
    assert same_bits(value, full_value)
    assert same_bits(shard_grad, full_grad.chunk(2, dim=1)[tp.get_local_rank()])
    assert bool(value.isfinite().all())
    assert bool(shard_grad.isfinite().all())
