"""Saving a training run: ours beside torch's ``dcp.save``; how long an asynchronous save blocks.

A model of square layers under FSDP2 with AdamW's moments. Each round saves once with each
contestant, into a new folder each, with nothing left to be written by the disk before:

* ``dcp.save``: torch's state dicts of model and optimizer through ``dcp.save``, its defaults;
* ``ours``: ``FSDPCheckpointManager.save``: hashed, flushed, committed by a rename;
* ``ours async``: the same in the background; *blocked* is the time until the call returns.

A time is that of the slowest rank, a figure the median over rounds. The first round, in which
asynchronous saves get their memory, is told apart. Memory is the growth of a rank's anonymous
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
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import primitives.backend
from primitives.checkpoint import FSDPCheckpointManager

WIDTH = 1024
BYTES_A_LAYER = 3 * 4 * WIDTH * WIDTH  # weights and two moments in float32
SAMPLE_S = 0.004
CONTESTANTS = ("dcp.save", "ours", "ours async")


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

    def savers(self, root: Path) -> dict[str, Callable[[int], Callable[[], None]]]:
        """By name: starts a save of a step into a folder of that name; what it returns waits."""

        def plain(step: int) -> Callable[[], None]:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            folder = root / "dcp.save" / str(step)
            dcp_save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
            return lambda: None

        def ours(name: str, asynchronous: bool) -> Callable[[int], Callable[[], None]]:
            manager = FSDPCheckpointManager(root / name, self.model, self.optimizer)

            def save(step: int) -> Callable[[], None]:
                manager.save(step, asynchronous=asynchronous)
                return manager.wait

            return save

        return {
            "dcp.save": plain,
            "ours": ours("ours", False),
            "ours async": ours("ours async", True),
        }


def run_rank(
    rank: int, world_size: int, port: int, nbytes: int, num_rounds: int, root: str,
    results: "mp.Queue[Result]",
) -> None:  # fmt: skip
    """One rank, in its own process."""
    torch.set_num_threads(1)
    primitives.backend.register()
    store = TCPStore("127.0.0.1", port, is_master=False)
    limit = timedelta(minutes=5)
    dist.init_process_group(
        "primitives", store=store, rank=rank, world_size=world_size, timeout=limit
    )
    run = TrainingRun(nbytes)
    samples: dict[str, list[list[float]]] = {name: [] for name in CONTESTANTS}
    savers = run.savers(Path(root))
    for step in range(num_rounds + 1):
        for name in CONTESTANTS:
            if rank == 0:
                shutil.rmtree(Path(root, name), ignore_errors=True)
                os.sync()
            dist.barrier()
            with PeakMemory() as memory:
                start = time.perf_counter()
                wait = savers[name](step)
                blocked_s = time.perf_counter() - start
                wait()
                dist.barrier()
                save_s = time.perf_counter() - start
            worst = torch.tensor([save_s, blocked_s, memory.nbytes], dtype=torch.float64)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            samples[name].append(worst.tolist())
    if rank == 0:
        figures = {}
        for name, (first, *rounds) in samples.items():
            save_s, blocked_s, _ = map(statistics.median, zip(*rounds, strict=True))
            extra_nbytes = int(max(one[2] for one in (first, *rounds)))
            figures[name] = Figures(save_s, blocked_s, first[1], extra_nbytes)
        results.put(Result(run.nbytes, world_size, num_rounds, root, figures))
    dist.destroy_process_group()


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
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    results: mp.Queue[Result] = context.Queue()
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as root:
        ranks = [
            context.Process(
                target=run_rank,
                args=(rank, num_ranks, store.port, nbytes, num_rounds, root, results),
            )
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if failed := [rank for rank, process in enumerate(ranks) if process.exitcode != 0]:
            raise RuntimeError(f"benchmark ranks {failed} failed; see their messages above")
        return results.get()
