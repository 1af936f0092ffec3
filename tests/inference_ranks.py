"""Eight ranks that play the cases of test_inference_layouts.py: one start serves all of them.

A layout's replicas are worlds of their own, side by side; request i goes to replica i % dp.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from primitives import backend
from scenarios.inference import forward
from scenarios.inference.model_files import read_model
from scenarios.inference_config import EngineConfig
from scenarios.layout import Layout
from scenarios.parallel.mesh import Mesh
from tests.inference_cases import make_engine, run_all, small_requests

NUM_RANKS = 8
NUM_REQUESTS = 12
REQUESTS = small_requests(NUM_REQUESTS, stop_strings=("aab", "b ", "😀"))
LAYOUTS = [
    *("tp1", "tp2", "tp4", "pp2", "tp2,pp2", "tp4,pp2"),
    *("dp2", "tp2,dp2", "tp4,dp2", "pp2,dp2", "tp2,pp2,dp2"),
    *("tp2,sp", "tp2,pp2,dp2,sp", "tp4,pp2,sp"),
]
CONFIG = EngineConfig(block_size=4, kv_budget_nbytes=2**16, max_batch_tokens=20, max_running=6)
"""Some prompts are cut into chunks, and blocks run out."""


def skip_sum_over_tp() -> Any:
    """Every tp rank goes on with the sum over its own parts."""
    return mock.patch.object(Mesh, "sum_over_tp", lambda mesh, partial: partial)


def forget_the_last_key() -> Any:
    """A query of a batch of decodes does not see its own token."""
    right = forward.StepBatch._attended

    def wrong(*args: Any) -> Any:
        group = right(*args)
        group.hidden[..., -1] |= group.hidden.shape[-1] > 1
        return group

    return mock.patch.object(forward.StepBatch, "_attended", wrong)


BUGS = {"tp sum left out": ("tp2", skip_sum_over_tp), "own key": ("tp2", forget_the_last_key)}


def play(folder: Path, rank: int, name: str, layout: Layout) -> None:
    """One layout."""
    num_ranks = layout.tp * layout.pp
    replica = rank // num_ranks
    if replica >= layout.dp:
        return
    store = dist.FileStore(str(folder / f"{name} {replica}.store"), num_ranks)
    dist.init_process_group("primitives", store=store, rank=rank % num_ranks, world_size=num_ranks)
    mesh = Mesh.connect(Layout.build(tp=layout.tp, pp=layout.pp, sp=layout.sp))
    engine = make_engine(read_model(folder / "model"), CONFIG, mesh)
    results = run_all(engine, REQUESTS[replica :: layout.dp])
    if rank % num_ranks == 0:
        path = folder / f"{name} of {replica}.json"
        path.write_text(json.dumps(results.as_json()))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: str, rank: str) -> None:
    """The life of a rank."""
    torch.set_num_threads(1)
    backend.register()
    for text in LAYOUTS:
        play(Path(folder), int(rank), text, Layout.parse(text))
    for name, (text, inject) in BUGS.items():
        with inject():
            play(Path(folder), int(rank), name, Layout.parse(text))
