"""torch's pipeline schedules equal one process, bit for bit; see [Note: exact arithmetic]."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
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
