"""Engines for tests: a few numbers summed over the ranks, and the ways a run goes wrong."""

import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from primitives.checkpoint import CheckpointManager
from scenarios.run_context import RunContext
from scenarios.schema import Scenario

AtStep = Callable[[int], None]


def train(scenario: Scenario, run: RunContext, at_step: AtStep = lambda step: None) -> None:
    """Walks a parameter by the mean of the ranks' shares; every number depends on every step."""
    manager = CheckpointManager(run.checkpoint_dir)
    weight = torch.ones(8)
    first = 1
    if run.resume:
        first = manager.load({"weight": weight}) + 1
    parts = scenario.layout.dp
    for step in range(first, scenario.training.train_iters + 1):
        start_s = time.perf_counter()
        at_step(step)
        # Eight shares for any number of ranks, so that the sum is the same for all of them.
        shares = torch.zeros(8)
        own = slice(dist.get_rank() * 8 // parts, (dist.get_rank() + 1) * 8 // parts)
        shares[own] = weight[own] / (step + torch.arange(8)[own])
        dist.all_reduce(shares)
        weight -= 0.125 * shares
        run.log(
            step,
            {
                "lm loss": float(weight[0] + weight[7]),
                "num-zeros": None if step == 2 else step,
                "grad-norm": float(shares[3]),
                "params-norm": float(weight[5]),
                "learning-rate": 0.001 / step,
                "loss-scale": 2.0**step,
                "params-digest": weight.numpy().tobytes().hex(),
                "iteration-time": time.perf_counter() - start_s,
            },
        )
        if step % (scenario.checkpoint.save_interval or step + 1) == 0:
            manager.save(step, {"weight": weight})
    manager.wait()


def train_and_kill_rank_1(scenario: Scenario, run: RunContext) -> None:
    """SIGKILL at step 5, after the checkpoint of step 3."""

    def at_step(step: int) -> None:
        if step == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(scenario, run, at_step)


def train_and_raise_on_rank_1(scenario: Scenario, run: RunContext) -> None:
    """A plain error at step 2."""

    def at_step(step: int) -> None:
        if step == 2 and dist.get_rank() == 1:
            raise ArithmeticError("a made-up error")

    train(scenario, run, at_step)


def train_and_hang(scenario: Scenario, run: RunContext) -> None:
    """Rank 1 sleeps from step 2 on."""

    def at_step(step: int) -> None:
        if step == 2 and dist.get_rank() == 1:
            time.sleep(600)

    train(scenario, run, at_step)


def train_to_nan(scenario: Scenario, run: RunContext) -> None:
    """The loss of step 4 is NaN."""

    def log(step: int, metrics: object) -> None:
        assert isinstance(metrics, dict)
        run.log(step, metrics | {"lm loss": float("nan")} if step == 4 else metrics)

    train(scenario, RunContext(run.out_dir, run.checkpoint_dir, run.resume, log))


def train_forgetting(scenario: Scenario, run: RunContext) -> None:
    """A resumed run starts from a slightly other weight."""

    def log(step: int, metrics: object) -> None:
        assert isinstance(metrics, dict)
        nudge = 2.0**-24 if run.resume and step == 5 else 0.0
        run.log(step, metrics | {"lm loss": metrics["lm loss"] + nudge})

    train(scenario, RunContext(run.out_dir, run.checkpoint_dir, run.resume, log))


def train_in_a_group_that_rank_1_never_joins(scenario: Scenario, run: RunContext) -> None:
    """Rank 0 offers shared memory that nobody takes, and waits."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier(dist.new_group([0, 1]))
