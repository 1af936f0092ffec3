"""SIGKILL at evenly spread points of a save: whatever is committed loads and replays bit for bit.

    python tests/checkpoint_kills.py --points 200

Two ranks train a small FSDP2 model. A point is a line of ``primitives/checkpoint`` that one rank is
about to execute, in the caller's thread or in the one that writes in the background. The kill hits
that rank, and at every second point the other one, too; else the other one must fail by itself.
Then two new ranks load the newest checkpoint, must hold and replay the state of before or of after
the save, and save again, which must sweep what the dead left.
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch._dynamo  # FSDP2 imports it at its first use: here once, instead of in every rank
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from primitives import checkpoint
from primitives.backend import register
from primitives.checkpoint import FSDPCheckpointManager
from primitives.checkpoint.survey import survey
from primitives.errors import CheckpointSaveFailed, CollectiveError

NUM_RANKS = 2
WATCHED = str(Path(checkpoint.__file__).parent)
LIMIT_S = 60.0


class Kill(NamedTuple):
    """When to kill: the n-th line of a rank."""

    rank: int
    line: int
    everyone: bool


class Watch:
    """Counts executed lines, and kills this process at one of them."""

    def __init__(self, at: int | None, everyone: bool) -> None:
        self._at = at
        self._everyone = everyone
        self.num_lines = 0

    def __enter__(self) -> "Watch":
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(WATCHED) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self._at:
                if self._everyone:
                    os.killpg(0, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        return self._line


class Run:
    """One rank's training run."""

    def __init__(self, root: Path, rank: int, keep: int | None = None) -> None:
        torch.manual_seed(7)
        self.model: Any = nn.Sequential(
            nn.Linear(5, 9), nn.Dropout(0.3), nn.GELU(), nn.Linear(9, 3)
        )
        fully_shard(self.model, mesh=dist.init_device_mesh("cpu", (NUM_RANKS,)))
        torch.manual_seed(rank)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.manager = FSDPCheckpointManager(root, self.model, self.optimizer, keep=keep)

    def update(self) -> None:
        """One step on data drawn from the random generator."""
        self.model(torch.randn(4, 5)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def digest(self) -> str:
        """Of everything that the next step depends on."""
        found = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        for parameter in self.model.parameters():
            found.update(parameter.to_local().detach().numpy().tobytes())
            for _, moment in sorted(self.optimizer.state[parameter].items()):
                local = getattr(moment, "to_local", lambda m=moment: m)()
                found.update(local.numpy().tobytes())
        return found.hexdigest()


def prepare(root: Path, rank: int, watch: Watch) -> str:
    run = Run(root, rank)
    for step in (1, 2):
        run.update()
        run.manager.save(step, {"tag": "before"})
    return ""


def save_new(root: Path, rank: int, watch: Watch) -> str:
    run = Run(root, rank, keep=2)
    run.manager.load(2)
    run.update()
    with watch:
        run.manager.save(3, {"tag": "after"})
    return str(watch.num_lines)


def save_asynchronously(root: Path, rank: int, watch: Watch) -> str:
    run = Run(root, rank)
    run.manager.load(2)
    run.update()
    with watch:
        run.manager.save(3, {"tag": "after"}, asynchronous=True)
        run.update()
        run.manager.wait()
    return str(watch.num_lines)


def overwrite(root: Path, rank: int, watch: Watch) -> str:
    run = Run(root, rank)
    run.manager.load(2)
    run.update()
    with watch:
        run.manager.save(2, {"tag": "after"})
    return str(watch.num_lines)


MODES = {"new, keep 2": save_new, "asynchronous": save_asynchronously, "overwrite": overwrite}


def replay(root: Path, rank: int, watch: Watch) -> str:
    """Loads, digests, steps, digests again; then saves, and looks at what is left."""
    run = Run(root, rank)
    step, extras = run.manager.load()
    found = f"step {step}, {extras['tag']}: {run.digest()}"
    run.update()
    found += f" -> {run.digest()}"
    run.manager.save(9)
    left = sorted(path.name for path in root.glob(".*"))
    assert left == [".lock"], left
    return found


Part = Callable[[Path, int, Watch], str]


def play(root: Path, part: Part, kill: Kill | None = None) -> list[str]:
    """Runs two ranks; what each returned, its error, or the signal that ended it."""
    with tempfile.TemporaryDirectory() as place:
        children = []
        for rank in range(NUM_RANKS):
            child = os.fork()
            if child == 0:
                os.setpgid(0, children[0] if children else 0)
                _be_a_rank(root, part, kill, rank, Path(place))
            os.setpgid(child, children[0] if children else child)
            children.append(child)
        limit = time.monotonic() + LIMIT_S
        endings: dict[int, int] = {}
        while len(endings) < NUM_RANKS:
            for rank, child in enumerate(children):
                if rank not in endings:
                    found, status = os.waitpid(child, os.WNOHANG)
                    if found:
                        endings[rank] = status
            if time.monotonic() > limit:
                os.killpg(children[0], signal.SIGKILL)
                raise TimeoutError(f"{part.__name__}, {kill}: ranks still run after {LIMIT_S} s")
            time.sleep(0.002)
        return [_ending(endings[rank], Path(place, str(rank))) for rank in range(NUM_RANKS)]


def _be_a_rank(root: Path, part: Part, kill: Kill | None, rank: int, place: Path) -> None:
    status = 1
    try:
        mine = kill is not None and kill.rank == rank
        watch = Watch(kill.line if kill and mine else None, bool(kill and kill.everyone))
        register()
        store = dist.FileStore(str(place / "store"), NUM_RANKS)
        dist.init_process_group(
            "primitives",
            store=store,
            rank=rank,
            world_size=NUM_RANKS,
            timeout=timedelta(seconds=20),
        )
        (place / str(rank)).write_text(part(root, rank, watch))
        status = 0
    except (CollectiveError, CheckpointSaveFailed) as error:
        (place / str(rank)).write_text(f"{type(error).__name__}: {error}")
    except BaseException:
        (place / str(rank)).write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _ending(status: int, told: Path) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    text = told.read_text() if told.exists() else ""
    return text if status == 0 else f"failed: {text}"


def try_mode(
    name: str, part: Part, points: Iterable[int], num_points: int, place: Path
) -> list[str]:
    """Kills at some points, of so many, of one kind of save; complaints."""
    pristine = place / "pristine"
    if not pristine.exists():
        _whole(play(pristine, prepare))
    done = Path(shutil.copytree(pristine, place / f"{name} done"))
    num_lines = [int(text) for text in _whole(play(done, part))]
    before = _whole(play(Path(shutil.copytree(pristine, place / f"{name} before")), replay))
    after = _whole(play(done, replay))
    assert before != after
    complaints, outcomes = [], {"before": 0, "after": 0}
    for point in points:
        root = Path(shutil.copytree(pristine, place / "root"))
        rank = point % NUM_RANKS
        line = 1 + point * (num_lines[rank] - 1) // max(1, num_points - 1)
        kill = Kill(rank, line, everyone=point // NUM_RANKS % 2 == 0)
        endings = play(root, part, kill)
        where = f"{name}, {kill}"
        if endings[rank] != f"signal {signal.SIGKILL:d}":
            complaints.append(f"{where}: the rank ended by {endings[rank]}")
        survivor = endings[1 - rank]
        if (
            not kill.everyone
            and not survivor.isdigit()
            and not survivor.startswith(("failed: PeerLost", "failed: CheckpointSaveFailed"))
        ):
            complaints.append(f"{where}: the other rank ended by {survivor}")
        complaints += [
            f"{where}: {found.problem}" for found in survey(root, digests=True) if found.problem
        ]
        got = play(root, replay)
        if got in (before, after):
            outcomes["before" if got == before else "after"] += 1
        else:
            complaints.append(f"{where}: replays {got}, expected {before} or {after}")
        shutil.rmtree(root)
    num_kills = sum(outcomes.values())
    print(f"{name}: {num_lines} lines, {num_kills} kills, the newest is {outcomes}", flush=True)
    return complaints


def _whole(endings: list[str]) -> list[str]:
    for ending in endings:
        if ending.startswith(("failed", "signal")):
            raise RuntimeError(ending)
    return endings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--points", type=int, default=200, help="kills of each kind of save")
    parser.add_argument("--mode", choices=MODES, action="append", help="only this kind of save")
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N runs of a part each")
    arguments = parser.parse_args()
    number, num_parts = map(int, arguments.part.split("/"))
    points = range(number - 1, arguments.points, num_parts)
    with tempfile.TemporaryDirectory() as place:
        complaints = [
            complaint
            for name in arguments.mode or MODES
            for complaint in try_mode(name, MODES[name], points, arguments.points, Path(place))
        ]
    print("\n".join(complaints), end="\n" if complaints else "")
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    main()
