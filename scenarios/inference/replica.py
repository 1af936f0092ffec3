"""A rank of a replica: all ranks of a replica obey the same messages between the same steps.

The leader, rank 0, talks with the coordinator; before every step it tells its peers what came, also
when nothing did. So a rank that dies is noticed within a moment by all, in a step or between two.
"""

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgpack
import torch
import torch.distributed as dist

from primitives import backend
from scenarios.data.tokenizer import load_tokenizer
from scenarios.inference.engine import Engine, Progress
from scenarios.inference.errors import CoordinatorLost
from scenarios.inference.link import Link
from scenarios.inference.model_files import read_model
from scenarios.inference.request import Request
from scenarios.inference_config import EngineConfig
from scenarios.layout import Layout
from scenarios.parallel.mesh import Mesh

IDLE_S = 0.1
"""Between two words to the peers, and signs of life, when there is nothing to do."""
LIMIT_S = 120.0
"""A peer that does not come to a collective for so long is missing."""

Command = tuple[str, dict[str, Any]]


class Leader:
    """Rank 0's talk with the coordinator.

    Args:
        link: to it.
        secret: of the service.
        replica: which one this is.
    """

    def __init__(self, link: Link, secret: str, replica: int):
        self._link = link
        self._num_tokens: dict[str, int] = {}
        link.send("REGISTER", secret=secret, replica=replica)

    def commands(self, busy: bool) -> list[Command]:
        """What the coordinator wants; waits a moment for it unless there is work."""
        try:
            messages = self._link.poll(0.0 if busy else IDLE_S)
        except CoordinatorLost as error:
            return [("ABANDONED", {"message": str(error)})]
        for kind, fields in messages:
            if kind == "ERROR":
                print(f"coordinator: {fields['message']}", file=sys.stderr)
        return [message for message in messages if message[0] != "ERROR"]

    def report(self, steps: Sequence[Progress], state: str, engine: Engine) -> None:
        """A sign of life, then what a step did: who has a result can see its blocks free."""
        entries = []
        for p in steps:
            first = self._num_tokens.get(p.key, 0)
            self._num_tokens[p.key] = first + (p.token is not None)
            if p.finished:
                del self._num_tokens[p.key]
            entries.append(
                [p.key, first, p.token, p.log_prob, p.digest, p.prompt_log_probs, p.finished]
            )
        self._link.send(
            "BEAT",
            state=state,
            blocks_in_use=engine.blocks_in_use,
            num_blocks=engine.num_blocks,
            num_requests=engine.num_requests,
        )
        if entries:
            self._link.send("STEP", entries=entries)

    def forget(self, key: str) -> None:
        """No more progress of this one will come."""
        self._num_tokens.pop(key, None)


def serve(engine: Engine, mesh: Mesh, leader: Leader | None) -> None:
    """Steps and obeys until STOPPED.

    Args:
        engine: of this rank.
        mesh: of the replica.
        leader: on rank 0.

    Raises:
        CoordinatorLost: on all ranks.
    """
    state = "PAUSED"
    while state != "STOPPED":
        busy = state == "RUNNING" and engine.num_requests > 0
        for kind, fields in _share(leader.commands(busy) if leader else [], mesh):
            match kind:
                case "WORK":
                    engine.submit(Request.build(**fields["request"]), fields["ticket"])
                case "DROP":
                    engine.abort(fields["ticket"])
                    if leader:
                        leader.forget(fields["ticket"])
                case "ENTER":
                    state = fields["state"]
                    if state == "SUSPENDED":
                        engine.suspend()
                case "ABANDONED":
                    raise CoordinatorLost(fields["message"])
                case _:
                    raise ValueError(f"replica: got message {kind}, expected WORK, DROP or ENTER")
        steps = engine.step() if state == "RUNNING" else []
        if leader:
            leader.report(steps, state, engine)


def _share(commands: list[Command], mesh: Mesh) -> list[Command]:
    """The leader's commands on all ranks."""
    world = mesh.world
    if world.handle is None:
        return commands
    content = msgpack.packb(commands) if world.rank == 0 else b""
    length = torch.tensor([len(content)])
    dist.broadcast(length, src=world.ranks[0], group=world.handle)
    buffer = torch.zeros(int(length), dtype=torch.uint8)
    if world.rank == 0:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(buffer, src=world.ranks[0], group=world.handle)
    return [(kind, fields) for kind, fields in msgpack.unpackb(buffer.numpy().tobytes())]


def main(path: str, replica: str, rank: str) -> None:
    """A rank's process; leaves at once on an error: the peers see it lost.

    Args:
        path: of a JSON file with ``model_folder``, ``layout``, ``config``, ``secret`` and
            ``address``, the file that tells the coordinator's.
        replica, rank: which ones.
    """
    faulthandler.enable()
    torch.set_num_threads(1)
    try:
        _run(json.loads(Path(path).read_text(encoding="utf-8")), int(replica), int(rank))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        # An orderly exit would wait in native code for peers that will never come.
        os._exit(1)


def _run(job: dict[str, Any], replica: int, rank: int) -> None:
    layout = Layout.build(**job["layout"])
    num_ranks = layout.world_size
    if num_ranks > 1:
        backend.register()
        store = dist.FileStore(  # type: ignore[attr-defined]
            f"{job['stores']}/replica{replica}", num_ranks
        )
        dist.init_process_group(
            "primitives",
            store=store,
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=LIMIT_S),
        )
    mesh = Mesh.connect(layout) if num_ranks > 1 else Mesh(layout, 0, {})
    model = read_model(Path(job["model_folder"]))
    tokenizer = load_tokenizer(str(model.tokenizer)) if model.tokenizer else None
    config = EngineConfig.build(**job["config"])
    engine = Engine(model.config, model.load(mesh), mesh, config, tokenizer)
    if num_ranks > 1:
        dist.barrier()  # nobody registers before all are there
    link = Link(Path(job["address"]).read_text(encoding="utf-8")) if rank == 0 else None
    serve(engine, mesh, Leader(link, job["secret"], replica) if link else None)
    if link:
        link.close()
    if num_ranks > 1:
        dist.destroy_process_group()
