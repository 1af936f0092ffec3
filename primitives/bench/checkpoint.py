"""Saving a training run: ours beside torch's ``dcp.save``; how long an asynchronous save blocks.

A model of square layers under FSDP2 with AdamW's moments. Each round saves once with each
contestant, into a new folder each, with nothing left to be written by the disk before:

* ``dcp.save``: torch's state dicts of model and optimizer through ``dcp.save``, its defaults;
* ``ours``: ``FSDPCheckpointManager.save``: hashed, flushed, committed by a rename;
* ``ours async``: the same in the background; *blocked* is the time until the call returns.

A time is that of the slowest rank, a figure the median over rounds after the first, which is told
apart. Memory is what the manager keeps before the first save, and the growth of a rank's anonymous
memory during a save (of the worst rank), sampled every few milliseconds; file caches do not count.
"""

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from primitives.bench.processes import run_ranks
from primitives.checkpoint import FSDPCheckpointManager

WIDTH = 1024
BYTES_A_LAYER = 3 * 4 * WIDTH * WIDTH  # weights and two moments in float32
SAMPLE_S = 0.004


@dataclass(frozen=True)
class Figures:
    """Of one contestant: seconds, and bytes on the worst rank."""

    save_s: float
    """until all is on the disk"""
    blocked_s: float
    """until the call returns"""
    first_blocked_s: float
    """the same in the first round"""
    extra_nbytes: int


@dataclass(frozen=True)
class Result:
    """What was saved, and by whom how fast."""

    nbytes: int
    num_ranks: int
    num_rounds: int
    folder: str
    figures: dict[str, Figures]


class PeakMemory:
    """Growth of this process's anonymous memory while it is entered."""

    def __enter__(self) -> "PeakMemory":
        self._before = self.nbytes = _anonymous_nbytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.nbytes = max(self.nbytes, _anonymous_nbytes()) - self._before

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.nbytes = max(self.nbytes, _anonymous_nbytes())


def _anonymous_nbytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])


@dataclass(frozen=True)
class Saver:
    """One contestant."""

    start: Callable[[int], Callable[[], None]]
    """starts the save of a step; what it returns waits for the end"""
    reserved_nbytes: int = 0


class TrainingRun:
    """One rank's model, with moments as after a step."""

    def __init__(self, nbytes: int) -> None:
        num_layers = max(1, round(nbytes / BYTES_A_LAYER))
        self.nbytes = num_layers * BYTES_A_LAYER
        self.model = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH, bias=False, device="meta") for _ in range(num_layers))
        )
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.model.to_empty(device="cpu")
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            for tensor in (parameter, parameter.grad):  # DTensors; their shards are what matters
                tensor.detach().to_local().normal_()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def savers(self, root: Path) -> dict[str, "Saver"]:
        """By name: savers into a folder of that name."""

        def plain(step: int) -> Callable[[], None]:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            folder = root / "dcp.save" / str(step)
            dcp_save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
            return lambda: None

        def ours(name: str, asynchronous: bool) -> Saver:
            manager = FSDPCheckpointManager(
                root / name, self.model, self.optimizer, asynchronous=asynchronous
            )

            def save(step: int) -> Callable[[], None]:
                manager.save(step)
                return manager.wait

            return Saver(save, manager.checkpoints.reserved_nbytes)

        return {
            "dcp.save": Saver(plain),
            "ours": ours("ours", False),
            "ours async": ours("ours async", True),
        }


def run_rank(nbytes: int, num_rounds: int, root: str) -> Result:
    """One rank, in its own process."""
    rank = dist.get_rank()
    run = TrainingRun(nbytes)
    savers = run.savers(Path(root))
    samples: dict[str, list[list[float]]] = {name: [] for name in savers}
    for step in range(num_rounds + 1):
        for name, saver in savers.items():
            if rank == 0:
                shutil.rmtree(Path(root, name), ignore_errors=True)
                os.sync()
            dist.barrier()
            with PeakMemory() as memory:
                start = time.perf_counter()
                wait = saver.start(step)
                blocked_s = time.perf_counter() - start
                wait()
                dist.barrier()
                save_s = time.perf_counter() - start
            extra_nbytes = saver.reserved_nbytes + memory.nbytes
            worst = torch.tensor([save_s, blocked_s, extra_nbytes], dtype=torch.float64)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            samples[name].append(worst.tolist())
    figures = {}
    for name, (first, *rounds) in samples.items():
        save_s, blocked_s, _ = map(statistics.median, zip(*rounds, strict=True))
        most_nbytes = int(max(one[2] for one in (first, *rounds)))
        figures[name] = Figures(save_s, blocked_s, first[1], most_nbytes)
    return Result(run.nbytes, dist.get_world_size(), num_rounds, root, figures)


def measure(num_ranks: int, nbytes: int, num_rounds: int) -> Result:
    """Saves about ``nbytes`` of model and moments, all ranks together, into a temporary folder.

    Raises:
        ValueError: no round, or less than a layer.
        RuntimeError: a rank failed; its message is on stderr.
    """
    if num_rounds < 1 or nbytes < BYTES_A_LAYER:
        raise ValueError(
            f"bench checkpoint: got -n {num_rounds} -e {nbytes}, expected 1 or more rounds of "
            f"{BYTES_A_LAYER} or more bytes"
        )
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as root:
        main = partial(run_rank, nbytes, num_rounds, root)
        return run_ranks(main, num_ranks, timedelta(minutes=5))
