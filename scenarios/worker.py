"""One rank, a process that ``scenarios.launch`` starts.

It joins the process group, trains, and on any error leaves ``failure_rank_N.json`` in the run's
folder.
"""

import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from scenarios.golden import write_atomically
from scenarios.metrics_file import MetricsWriter
from scenarios.run_context import RunContext


@dataclass(frozen=True)
class Job:
    """What every rank of one run is told, as JSON in ``run_dir/job.json``."""

    scenario: str
    """The scenario as JSON text (``Scenario.model_dump_json``)."""
    run_dir: str
    checkpoint_dir: str
    resume: bool
    engine: str
    """``module:function``, called as ``function(scenario, run)``."""
    device: str = "cpu"
    """cpu or cuda: with fewer GPUs than ranks of a host they share."""

    def write(self) -> Path:
        """Writes ``job.json`` and returns its path."""
        path = Path(self.run_dir) / "job.json"
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def failure_path(run_dir: Path, rank: int) -> Path:
    """Where a rank leaves the report of its error."""
    return run_dir / f"failure_rank_{rank}.json"


def run_rank(job: Job) -> None:
    """Joins the process group and trains, in this process."""
    # The launcher imports this module too, and must not wait for torch.
    from primitives.rendezvous import rank_info

    info = rank_info()
    if info is None:
        raise ValueError("RANK and WORLD_SIZE are not set: testbed run starts this module")
    run_dir = Path(job.run_dir)
    writer = MetricsWriter(run_dir / "metrics.jsonl") if info.rank == 0 else None
    try:
        import torch.distributed as dist
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        from primitives import backend
        from primitives.devices import cuda_device
        from scenarios.schema import Scenario

        scenario = Scenario.model_validate_json(job.scenario)
        module, function = job.engine.split(":")
        train: Callable[[Scenario, RunContext], None] = getattr(
            importlib.import_module(module), function
        )
        backend.register()
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=60),
        )
        dist.init_process_group(
            "primitives", store=store, rank=info.rank, world_size=info.world_size
        )
        run = RunContext(
            out_dir=run_dir,
            checkpoint_dir=Path(job.checkpoint_dir),
            resume=job.resume,
            log=writer.log if writer else lambda step, metrics: None,
            device=str(cuda_device(info.local_rank)) if job.device == "cuda" else job.device,
        )
        train(scenario, run)
        dist.destroy_process_group()
    except Exception as error:
        report = {
            "rank": info.rank,
            "type": type(error).__name__,
            "message": str(error),
            "step": writer.last_step if writer else None,
            "time_s": time.time(),
            "traceback": traceback.format_exc(),
        }
        write_atomically(failure_path(run_dir, info.rank), json.dumps(report, indent=1) + "\n")
        raise


def main(path: str) -> None:
    """Runs the rank of a ``job.json``; leaves at once on an error: the peers see it lost."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    try:
        run_rank(Job(**json.loads(Path(path).read_text(encoding="utf-8"))))
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # An orderly exit would wait in native code for peers that will never come.
        os._exit(1)
