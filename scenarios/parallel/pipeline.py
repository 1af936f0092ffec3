"""The 1F1B pipeline: each stage alternates forward and backward as soon as it can.

Source: Narayanan et al., "Efficient large-scale language model training on GPU clusters using
Megatron-LM", SC21, the schedule "PipeDream-Flush".
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from scenarios.models.model import Model
from scenarios.parallel.mesh import Mesh, Stage
from scenarios.parallel.microbatch import Microbatch

Task = tuple[Literal["forward", "backward"], int]


def one_f_one_b(stage: Stage, num_microbatches: int) -> Iterator[Task]:
    """What a stage does, in order.

    Args:
        stage: which one.
        num_microbatches: of one replica in one step.

    Yields:
        ("forward" or "backward", microbatch counted from 0). At most as many microbatches are
        between forward and backward as stages follow, and one.
    """
    num_warmup = min(stage.num_stages - stage.index - 1, num_microbatches)
    for i in range(num_warmup):
        yield "forward", i
    for i in range(num_microbatches - num_warmup):
        yield "forward", num_warmup + i
        yield "backward", i
    for i in range(num_microbatches - num_warmup, num_microbatches):
        yield "backward", i


class Pipeline:
    """Runs the microbatches of a step through this rank's stage.

    Args:
        model: the stage.
        mesh: activations go to the same tp and dp rank of the next stage.
        hidden_size: width of the activations.
        dtype: of the activations.
    """

    def __init__(self, model: Model, mesh: Mesh, hidden_size: int, dtype: torch.dtype):
        self._model = model
        self._mesh = mesh
        self._hidden_size = hidden_size
        self._dtype = dtype
        # Sends go on while this stage computes; a tensor lives until it has left.
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def run(
        self, microbatches: Sequence[Microbatch], start_backward: Callable[[Tensor], Tensor]
    ) -> None:
        """Forward and backward of all microbatches.

        Args:
            microbatches: of this replica, the same on all its stages.
            start_backward: on the last stage, called once per microbatch in order with the loss of
                every token; returns the gradient of the loss, of its shape.

        Contract: collective over the stages and tp ranks of one replica.
        """
        stage = self._mesh.stage
        running: dict[int, tuple[Tensor | None, Tensor]] = {}
        for kind, i in one_f_one_b(stage, len(microbatches)):
            if kind == "forward":
                x = None if stage.is_first else self._receive(microbatches[i], stage.index - 1)
                if x is not None:
                    x.requires_grad_()
                running[i] = x, self._model(x, microbatches[i])
                if not stage.is_last:
                    self._send(running[i][1].detach(), stage.index + 1)
            else:
                x, out = running.pop(i)
                if stage.is_last:
                    gradient = start_backward(out.detach())
                else:
                    gradient = self._receive(microbatches[i], stage.index + 1)
                torch.autograd.backward(out, gradient)
                if x is not None:
                    assert x.grad is not None
                    self._send(x.grad, stage.index - 1)
        self._reap(wait=True)

    def _receive(self, mb: Microbatch, stage: int) -> Tensor:
        tokens = mb.local_slice
        num_tokens = tokens.stop - tokens.start
        out = mb.tokens.new_empty(num_tokens, self._hidden_size, dtype=self._dtype)
        pp = self._mesh.pp
        dist.recv(out, src=pp.ranks[stage], group=pp.handle)
        return out

    def _send(self, x: Tensor, stage: int) -> None:
        self._reap(wait=False)
        x = x.contiguous()
        pp = self._mesh.pp
        work = dist.isend(x, dst=pp.ranks[stage], group=pp.handle)
        assert work is not None
        self._sending.append((work, x))

    def _reap(self, wait: bool) -> None:
        while self._sending and (wait or self._sending[0][0].is_completed()):
            self._sending.popleft()[0].wait()
