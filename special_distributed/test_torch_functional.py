"""Collectives of Python values; entropy and log-probability over a split vocabulary."""

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from primitives import vocab_parallel
from primitives._C import VocabShard
from primitives.collectives import all_gather_dict
from special_distributed.examples import examples


def test_all_gather_dict(world: dist.ProcessGroup, rank: int) -> None:
    metrics = {
        "loss": [1.5 + rank, float(rank)],
        "step": 7,
        "rank": rank,
        "names": [f"rank {rank}"] * rank,  # another length on every rank
        "nested": {"value": (rank, None)},
    }
    assert all_gather_dict(metrics) == {
        "loss": [[1.5, 0.0], [2.5, 1.0], [3.5, 2.0], [4.5, 3.0]],
        "step": [7, 7, 7, 7],
        "rank": [0, 1, 2, 3],
        "names": [[], ["rank 1"], ["rank 2"] * 2, ["rank 3"] * 3],
        "nested": [{"value": (r, None)} for r in range(4)],
    }


def test_all_gather_dict_of_a_subgroup(world: dist.ProcessGroup, rank: int) -> None:
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    gathered = all_gather_dict({"rank": rank}, groups[rank % 2])
    assert gathered == {"rank": [rank % 2, rank % 2 + 2]}


def test_all_gather_dict_names_rank_and_key(world: dist.ProcessGroup, rank: int) -> None:
    metrics = {"loss": 1.0, "grad-norm" if rank != 2 else "grad_norm": 2.0}
    with pytest.raises(ValueError, match="rank 2 lacks grad-norm; rank 2 also has grad_norm"):
        all_gather_dict(metrics)
    assert all_gather_dict({"next": rank}) == {"next": [0, 1, 2, 3]}  # the group goes on


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    same_kind = actual.dtype == expected.dtype and actual.shape == expected.shape
    return same_kind and torch.equal(
        actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


def inputs(num_tokens: int, vocab_size: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """The full logits with masked columns, labels with an ignored one, gradients [2, tokens]."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, vocab_size, generator=g).mul_(4)
    logits.masked_fill_(torch.rand(num_tokens, vocab_size, generator=g) < 0.1, -math.inf)
    logits[:, vocab_size // 3] = 1.0
    labels = torch.randint(vocab_size, (num_tokens,), generator=g)
    labels[num_tokens // 2] = -100
    return logits.to(dtype), labels, torch.randn(2, num_tokens, generator=g)


def evaluate(
    logits: Tensor, labels: Tensor, grads: Tensor, group: dist.ProcessGroup | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, log_prob and the gradient of this rank's logits."""
    leaf = logits.clone().requires_grad_()
    results = vocab_parallel.entropy_and_log_prob(leaf, labels, group, vocab_size=vocab_size)
    torch.autograd.backward(results, tuple(grads))
    assert same_bits(leaf.detach(), logits)  # unaltered
    assert leaf.grad is not None
    return results[0].detach(), results[1].detach(), leaf.grad


@pytest.fixture
def groups(world: dist.ProcessGroup) -> dict[str, dist.ProcessGroup]:
    """Four ranks and two, of this backend and of gloo."""
    rank = dist.get_rank()
    found = {"primitives": world, "gloo": dist.new_group(backend="gloo")}
    for backend in ("primitives", "gloo"):
        pairs = [dist.new_group(ranks, backend=backend) for ranks in ([0, 1], [2, 3])]
        found[f"{backend} pair"] = pairs[rank // 2]
    return found


@examples(
    12,
    name=st.sampled_from(["primitives", "gloo", "primitives pair", "gloo pair"]),
    vocab_size=st.integers(1, 5000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_a_split_vocabulary_gives_the_bits_of_a_whole_one(
    groups: dict[str, dist.ProcessGroup],
    rank: int,
    name: str,
    vocab_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    group = groups[name]
    logits, labels, grads = inputs(6, vocab_size, dtype, seed)
    shard = VocabShard(vocab_size, group.rank(), group.size())
    own = slice(shard.first, shard.first + shard.num_columns)
    entropy, log_prob, grad = evaluate(logits[:, own], labels, grads, group, vocab_size)
    full = evaluate(logits, labels, grads, None, vocab_size)
    assert same_bits(entropy, full[0])
    assert same_bits(log_prob, full[1])
    assert same_bits(grad, full[2][:, own])


@examples(
    8,
    name=st.sampled_from(["primitives", "gloo", "primitives pair", "gloo pair"]),
    vocab_size=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_a_split_head_gives_the_bits_of_a_whole_one(
    groups: dict[str, dist.ProcessGroup],
    rank: int,
    name: str,
    vocab_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    group = groups[name]
    _, labels, grads = inputs(6, vocab_size, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(6, 48, generator=g).to(dtype)
    weight = torch.randn(vocab_size, 48, generator=g).to(dtype)
    shard = VocabShard(vocab_size, group.rank(), group.size())
    own = slice(shard.first, shard.first + shard.num_columns)

    def evaluate_head(head: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        results = vocab_parallel.linear_entropy_and_log_prob(
            *leaves, labels, group, vocab_size=vocab_size
        )
        return *results, *torch.autograd.grad(results, leaves, tuple(grads))

    *results, by_hidden, by_head = evaluate_head(weight[own], group)
    *whole, by_hidden_of_whole, by_whole = evaluate_head(weight, None)
    for actual, expected in zip(results, whole, strict=True):
        assert same_bits(actual.detach(), expected.detach())
    assert same_bits(by_head, by_whole[own])
    if name.startswith("primitives"):  # gloo adds the ranks' gradients in another order
        assert same_bits(by_hidden, by_hidden_of_whole)
    else:
        torch.testing.assert_close(by_hidden, by_hidden_of_whole)


def num_collectives(work: Callable[[], object]) -> int:
    """Calls of c10d, of any backend."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("c10d::"))


@pytest.mark.parametrize("name", ["primitives", "gloo"])
def test_one_collective(groups: dict[str, dist.ProcessGroup], rank: int, name: str) -> None:
    group = groups[name]
    logits, labels, grads = inputs(5, 64, torch.float32, 0)
    shard = logits[:, 16 * rank : 16 * rank + 16]
    assert num_collectives(lambda: evaluate(shard, labels, grads, group, 64)) == 1
    assert num_collectives(lambda: vocab_parallel.cross_entropy(shard, labels, group)) == 1
    assert num_collectives(lambda: evaluate(logits, labels, grads, None, 64)) == 0
    assert num_collectives(lambda: [dist.barrier(group), dist.barrier(group)]) == 2


def test_bad_input_of_one_rank_is_the_same_error_on_all(
    groups: dict[str, dist.ProcessGroup], rank: int
) -> None:
    logits = torch.zeros(2, 3, 16)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    if rank == 2:
        labels[1, 2] = 64
    with pytest.raises(ValueError, match=r"0 <= label < 64 .* got 64 at \[1, 2\] on rank 2"):
        vocab_parallel.log_prob(logits, labels, groups["primitives"])
    wide = torch.zeros(1, 32 if rank == 3 else 16)
    with pytest.raises(ValueError, match="vocab_size: rank 0 has 64, rank 3 has 128"):
        vocab_parallel.entropy(wide, groups["primitives"])
    with pytest.raises(ValueError, match=f"puts {8 if rank < 2 else 4 if rank == 2 else 0} on"):
        vocab_parallel.entropy(torch.zeros(1, 5), groups["primitives"])
    assert vocab_parallel.entropy(torch.zeros(1, 16), groups["primitives"]).shape == (1,)


def test_compiled_on_a_group(groups: dict[str, dist.ProcessGroup], rank: int) -> None:
    group = groups["primitives"]
    logits, labels, grads = inputs(5, 64, torch.float32, 1)
    shard = logits[:, 16 * rank : 16 * rank + 16]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(z: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_parallel.entropy_and_log_prob(z, labels, group)

    leaf = shard.clone().requires_grad_()
    results = compiled(leaf)
    torch.autograd.backward(results, tuple(grads))
    expected = evaluate(shard, labels, grads, group, 64)
    assert leaf.grad is not None
    for actual, right in zip((*results, leaf.grad), expected, strict=True):
        assert same_bits(actual.detach(), right)
