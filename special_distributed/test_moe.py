"""A mixture of experts over all_to_all with uneven splits equals one process, bit for bit."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn

from special_distributed.exact_training import (
    NUM_RANKS,
    assert_same_tensors,
    fill,
)

WIDTH = 6
NUM_EXPERTS = 2 * NUM_RANKS


def expert(index: int) -> nn.Linear:
    return fill(nn.Linear(WIDTH, WIDTH), seed=index)


def tokens_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [tokens, width], the expert of each [tokens], and what flows back [tokens, width]."""
    generator = torch.Generator().manual_seed(rank)
    num_tokens = 5 + 3 * rank
    x, flow = (
        torch.randint(-2, 3, (num_tokens, WIDTH), generator=generator).float() for _ in range(2)
    )
    # Rank 1 uses one expert only; expert 5 is used by nobody.
    experts = torch.randint(0, NUM_EXPERTS, (num_tokens,), generator=generator)
    experts = torch.where(experts == 5, 3, experts)
    return x, experts if rank != 1 else torch.full_like(experts, 6), flow


def run_experts(x: Tensor, ids: Tensor, experts: dict[int, nn.Linear]) -> Tensor:
    """Each row through its expert."""
    rows = torch.zeros_like(x)
    for index, module in experts.items():
        chosen = (ids == index).nonzero().flatten()
        rows = rows.index_add(0, chosen, module(x[chosen]))
    return rows


def exchange(
    x: Tensor, to_each: list[int], from_each: list[int], group: dist.ProcessGroup
) -> Tensor:
    return functional.all_to_all_single_autograd(x, from_each, to_each, group)


def test_experts_on_four_ranks(world: dist.ProcessGroup, rank: int) -> None:
    x, ids, flow = tokens_of(rank)
    x.requires_grad_()
    order = ids.argsort(stable=True)
    to_each = torch.bincount(ids // 2, minlength=NUM_RANKS)
    from_each = torch.empty_like(to_each)
    dist.all_to_all_single(from_each, to_each)
    splits = to_each.tolist(), from_each.tolist()
    received_ids = torch.empty(sum(splits[1]), dtype=ids.dtype)
    dist.all_to_all_single(received_ids, ids[order], splits[1], splits[0])

    mine = {index: expert(index) for index in (2 * rank, 2 * rank + 1)}
    received = exchange(x[order], splits[0], splits[1], world)
    returned = exchange(run_experts(received, received_ids, mine), splits[1], splits[0], world)
    output = torch.zeros_like(x).index_copy(0, order, returned)
    output.backward(flow)

    alone = {index: expert(index) for index in range(NUM_EXPERTS)}
    for r in range(NUM_RANKS):
        x_alone, ids_alone, flow_alone = tokens_of(r)
        x_alone.requires_grad_()
        output_alone = run_experts(x_alone, ids_alone, alone)
        output_alone.backward(flow_alone)
        if r == rank:
            assert torch.equal(output, output_alone)
            assert torch.equal(x.grad, x_alone.grad)
    for index, module in mine.items():
        for p, q in zip(module.parameters(), alone[index].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), index


def test_differentiable_collectives(world: dist.ProcessGroup, rank: int) -> None:
    """torch.distributed.nn: lists of unequal tensors, forth and back."""
    sizes = [[1 + (s + 2 * r) % 3 for r in range(NUM_RANKS)] for s in range(NUM_RANKS)]
    sent = [torch.full((sizes[rank][r],), 10.0 * rank + r) for r in range(NUM_RANKS)]
    for tensor in sent:
        tensor.requires_grad_()
    outputs = [torch.empty(sizes[s][rank]) for s in range(NUM_RANKS)]
    received = differentiable.all_to_all(outputs, sent)
    for s, tensor in enumerate(received):
        assert_same_tensors(
            {"received": tensor.detach()},
            {"received": torch.full((sizes[s][rank],), 10.0 * s + rank)},
        )
    torch.stack([(s + 1) * tensor.sum() for s, tensor in enumerate(received)]).sum().backward()
    for tensor in sent:
        assert torch.equal(tensor.grad, torch.full_like(tensor, rank + 1))

    x = torch.arange(3.0).requires_grad_()
    reduced = differentiable.all_reduce(x * (rank + 1))
    assert torch.equal(reduced.detach(), torch.arange(3.0) * 10)
    (reduced * (rank + 1)).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 10.0 * (rank + 1)))
