"""Pipelines and experts equal one process, bit for bit; see [Note: exact arithmetic]."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from special_distributed.exact_training import NUM_RANKS, assert_same_tensors, fill

NUM_MICROBATCHES = 8
ROWS = 2  # of a microbatch
WIDTH = 4
# By schedule: the stages of each rank.
LOOP = [[r, r + NUM_RANKS] for r in range(NUM_RANKS)]
V = [[r, 2 * NUM_RANKS - 1 - r] for r in range(NUM_RANKS)]
SCHEDULES = [
    ("ScheduleGPipe", [[r] for r in range(NUM_RANKS)]),
    ("Schedule1F1B", [[r] for r in range(NUM_RANKS)]),
    ("ScheduleInterleaved1F1B", LOOP),
    ("ScheduleLoopedBFS", LOOP),
    ("ScheduleInterleavedZeroBubble", LOOP),
    ("ScheduleZBVZeroBubble", V),
]


class Stage(nn.Module):
    """x + W x: without a nonlinearity, so that eight of them stay exact."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():  # one element each: the values grow slowly
            self.linear.weight.zero_()[index % WIDTH, (index + 1) % WIDTH] = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def integers(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_MICROBATCHES * ROWS, WIDTH)
    return torch.randint(-2, 3, shape, generator=generator).float()


def weighted_sum(output: Tensor, weights: Tensor) -> Tensor:
    return (output * weights).sum()


@pytest.mark.parametrize(("name", "layout"), SCHEDULES, ids=[name for name, _ in SCHEDULES])
def test_schedule(world: dist.ProcessGroup, rank: int, name: str, layout: list[list[int]]) -> None:
    num_stages = sum(map(len, layout))
    modules = {index: Stage(index) for index in layout[rank]}
    stages = [
        PipelineStage(module, index, num_stages, torch.device("cpu"))
        for index, module in modules.items()
    ]
    made: Any = getattr(pipelining, name, None) or getattr(pipelining.schedules, name)
    schedule = made(
        stages if len(stages) > 1 else stages[0],
        NUM_MICROBATCHES,
        loss_fn=weighted_sum,
        scale_grads=False,
    )
    x, weights = integers(1), integers(2)
    losses: list[Tensor] = []
    inputs = [x] if 0 in modules else []
    is_last = num_stages - 1 in modules
    for _ in range(2):  # the second run adds to the gradients
        losses.clear()
        schedule.step(*inputs, **({"target": weights, "losses": losses} if is_last else {}))

    alone = nn.Sequential(*[Stage(index) for index in range(num_stages)])
    total = weighted_sum(alone(x), weights)
    for _ in range(2):
        total.backward(retain_graph=True)
    if is_last:
        assert torch.equal(torch.stack(losses).sum(), total.detach())
    for index, module in modules.items():
        grad = alone[index].linear.weight.grad
        assert bool(grad.any())
        assert torch.equal(module.linear.weight.grad, grad), index


def test_messages_between_stages_keep_their_values(world: dist.ProcessGroup, rank: int) -> None:
    """Batched sends and receives of many sizes at once, both ways, as the schedules post them."""
    right, left = (rank + 1) % NUM_RANKS, (rank - 1) % NUM_RANKS
    numels = [1, 1000, 200_000, 3]
    to_right = [fill(nn.Linear(1, n), seed=rank).bias.detach() for n in numels]
    to_left = [tensor + 8 for tensor in to_right]
    from_left, from_right = ([torch.empty(n) for n in numels] for _ in range(2))
    ops = [
        *(dist.P2POp(dist.isend, tensor, right) for tensor in to_right),
        *(dist.P2POp(dist.isend, tensor, left) for tensor in to_left),
        *(dist.P2POp(dist.irecv, tensor, left) for tensor in from_left),
        *(dist.P2POp(dist.irecv, tensor, right) for tensor in from_right),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    for i, n in enumerate(numels):
        expected = {r: fill(nn.Linear(1, n), seed=r).bias.detach() for r in (left, right)}
        actual = {"left": from_left[i], "right": from_right[i]}
        assert_same_tensors(actual, {"left": expected[left], "right": expected[right] + 8})


# ---- a mixture of experts over all_to_all with uneven splits

TOKEN_WIDTH = 6
NUM_EXPERTS = 2 * NUM_RANKS


def expert(index: int) -> nn.Linear:
    return fill(nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH), seed=index)


def tokens_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [tokens, width], the expert of each [tokens], and what flows back [tokens, width]."""
    generator = torch.Generator().manual_seed(rank)
    num_tokens = 5 + 3 * rank
    x, flow = (
        torch.randint(-2, 3, (num_tokens, TOKEN_WIDTH), generator=generator).float()
        for _ in range(2)
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
