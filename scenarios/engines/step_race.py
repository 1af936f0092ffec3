"""Canonical and native steps in turn, in the same processes: what canonical arithmetic costs."""

import time

import torch.distributed as dist

from primitives import arithmetic
from scenarios.engines.builtin import Trainer
from scenarios.run_context import LogValue, RunContext
from scenarios.schema import Scenario

SIDES = ("canonical", "native")


def train(scenario: Scenario, run: RunContext) -> None:
    """Trains a scenario twice, a step of one side and a step of the other, from the same weights.

    Each step logs ``lm loss`` and ``iteration-time`` of both sides, under ``SIDE lm loss`` and so
    on. Who goes first changes with every step, so that a slower moment hits both.

    Args:
        scenario: what to train; its own arithmetic is not asked.
        run: where rank 0 logs; nothing is saved.

    Contract: as for ``scenarios.engines.builtin.train``.
    """
    trainers = {}
    for side in SIDES:
        with arithmetic.use(side):
            trainers[side] = Trainer(scenario)
            trainers[side].gather.start()
    for step in range(1, scenario.training.train_iters + 1):
        metrics: dict[str, LogValue] = {}
        for side in SIDES if step % 2 else reversed(SIDES):
            dist.barrier()
            start_s = time.perf_counter()
            with arithmetic.use(side):
                loss = trainers[side].train_step()["lm loss"]
            metrics[f"{side} iteration-time"] = time.perf_counter() - start_s
            metrics[f"{side} lm loss"] = loss
        if dist.get_rank() == 0:
            run.log(step, metrics)
    for trainer in trainers.values():
        trainer.gather.finish()
