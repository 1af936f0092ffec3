"""Checkpoints under fire: damaged files, kills anywhere, full disks, background saves."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import on_ranks

from primitives.checkpoint import CheckpointManager
from primitives.checkpoint import manager as checkpoint_manager
from primitives.checkpoint.chunks import collect
from primitives.checkpoint.exchange import Exchange
from primitives.checkpoint.folder import CheckpointRoot
from primitives.checkpoint.reader import load_state
from primitives.checkpoint.writer import save_state
from primitives.errors import CheckpointCorrupt, CheckpointSaveFailed

NUM_RANKS = 3


def content(step: int) -> dict[str, Any]:
    """A state in which every entry depends on the step."""
    parts = {f"w{part}": torch.full((5 + part,), float(step)) for part in range(NUM_RANKS)}
    return {"model": parts, "step": step, "note": [step, "x"]}


def part_of(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """What one of NUM_RANKS ranks holds."""
    own = f"w{rank}"
    return {"model": {own: state["model"][own]}, "step": state["step"], "note": state["note"]}


def save_on_ranks(root: Path, step: int) -> list[Any]:
    def body(exchange: Exchange) -> None:
        local = collect(part_of(content(step), exchange.rank))
        save_state(CheckpointRoot(root), step, lambda: local, exchange, None)

    return on_ranks(NUM_RANKS, body)


def loads(root: Path, step: int | None = None) -> int:
    """Loads with one rank, checks every entry against ``content`` and returns the step."""
    state = content(-1)
    loaded = CheckpointManager(root).load(state, step)
    expected = content(loaded)
    assert state["step"] == loaded
    assert state["note"] == expected["note"]
    for name, tensor in expected["model"].items():
        assert torch.equal(state["model"][name], tensor), name
    return loaded


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the checkpoints of steps 1 and 2 of three ranks; tests work on copies."""
    root = tmp_path_factory.mktemp("pristine")
    assert save_on_ranks(root, 1) == save_on_ranks(root, 2) == [None] * NUM_RANKS
    assert loads(root) == 2
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "root"))


def assert_refused(root: Path, file_name: str, step: int = 2) -> None:
    """Every rank refuses, names the file and leaves its state alone."""

    def body(exchange: Exchange) -> None:
        state = content(-1)
        try:
            load_state(CheckpointRoot(root), state, step, exchange)
        finally:
            assert repr(state) == repr(content(-1))

    for error in on_ranks(2, body):
        assert isinstance(error, CheckpointCorrupt), error
        assert f"{file_name}: " in str(error)


FILES = ["manifest.json", "index.json", *(f"shard_{rank:05d}.safetensors" for rank in range(3))]


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(1, 255))
def test_every_changed_byte_is_refused(pristine: Path, name: str, position: int, mask: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(pristine, Path(folder) / "root"))
        path = root / "iter_0000002" / name
        raw = bytearray(path.read_bytes())
        raw[position % len(raw)] ^= mask
        path.write_bytes(raw)
        assert_refused(root, name)
        assert loads(root, 1) == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: shutil.copy(path.parent.parent / "iter_0000001" / path.name, path),
    ],
    ids=["missing", "truncated", "empty", "longer", "of another save"],
)
def test_damaged_file_is_refused(damage: Callable[[Path], Any], name: str, root: Path) -> None:
    damage(root / "iter_0000002" / name)
    assert_refused(root, name)


def test_swapped_and_foreign_files_are_refused(root: Path) -> None:
    folder = root / "iter_0000002"
    first, second = folder / FILES[2], folder / FILES[3]
    first.rename(folder / "between")
    second.rename(first)
    (folder / "between").rename(second)
    assert_refused(root, FILES[2])
    folder = root / "iter_0000001"
    (folder / "extra.bin").touch()
    assert_refused(root, "extra.bin", step=1)
    (folder / "extra.bin").unlink()
    (folder / FILES[2]).rename(root / "elsewhere")
    (folder / FILES[2]).symlink_to(root / "elsewhere")
    assert_refused(root, FILES[2], step=1)


def test_folder_of_another_step_is_refused(root: Path) -> None:
    shutil.rmtree(root / "iter_0000002")
    (root / "iter_0000001").rename(root / "iter_0000002")
    assert_refused(root, "manifest.json")


@pytest.mark.parametrize("tracker", [b"", b"1", b"99\n", b"\xff\xfe", None])
def test_torn_tracker_changes_nothing(tracker: bytes | None, root: Path) -> None:
    (root / "latest").unlink()
    if tracker is not None:
        (root / "latest").write_bytes(tracker)
    assert loads(root) == 2


def test_save_goes_on_beside_a_damaged_checkpoint(root: Path) -> None:
    (root / "iter_0000001" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointCorrupt, match=r"iter_0000001/manifest.json: damaged"):
        CheckpointManager(root).latest()
    assert save_on_ranks(root, 3) == [None] * NUM_RANKS
    assert loads(root, 3) == 3


# Kills.

SAVE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def save_in_child(root: Path, step: int, kill_at: int, keep: int | None = None) -> bool:
    """Saves in a forked process that gets SIGKILL before its n-th file operation.

    Returns:
        Whether the save ended before the kill.
    """
    child = os.fork()
    if child == 0:
        num_events = 0

        def on_event(event: str, _: Any) -> None:
            nonlocal num_events
            if event in SAVE_EVENTS:
                num_events += 1
                if num_events == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            manager = CheckpointManager(root, keep=keep)
            state = content(step)
            sys.addaudithook(on_event)
            manager.save(step, state)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status == 0


@pytest.mark.parametrize(
    ("step", "keep"), [(3, None), (2, None), (3, 1)], ids=["new", "overwrite", "prune"]
)
def test_kill_at_every_operation_of_a_save(
    step: int, keep: int | None, pristine: Path, tmp_path: Path
) -> None:
    kill_at, outcomes, finished = 0, set(), False
    while not finished:
        kill_at += 1
        root = Path(shutil.copytree(pristine, tmp_path / str(kill_at)))
        generation = {s: (root / f"iter_{s:07d}/manifest.json").read_bytes() for s in (1, 2)}
        finished = save_in_child(root, step, kill_at, keep)
        latest = loads(root)
        assert latest in (2, step)
        replaced = CheckpointRoot(root).folder(latest) / "manifest.json"
        outcomes.add(replaced.read_bytes() != generation.get(latest))
        # The next save works, is the latest, and sweeps what the dead one left.
        CheckpointManager(root).save(4, content(4))
        assert loads(root) == 4
        assert loads(root, latest) == latest
        assert {path.name for path in root.glob(".*")} == {".lock"}
    assert kill_at > 10
    assert outcomes == {False, True}  # kills hit before and after the commit


def test_kill_of_another_rank_leaves_the_last_checkpoint(root: Path) -> None:
    """A rank that vanishes in mid-save: the others get an error, nothing is committed."""

    class Vanished(Exception):
        pass

    def body(exchange: Exchange) -> None:
        def local() -> Any:
            return collect(part_of(content(3), exchange.rank))

        gathers = 0
        original = exchange.all_gather

        def all_gather(item: Any) -> list[Any]:
            nonlocal gathers
            gathers += 1
            if exchange.rank == 1 and gathers == 2:  # before it tells what it wrote
                exchange._barrier.abort()  # type: ignore[attr-defined]
                raise Vanished
            return original(item)

        exchange.all_gather = all_gather  # type: ignore[method-assign]
        save_state(CheckpointRoot(root), 3, local, exchange, None)

    errors = on_ranks(NUM_RANKS, body)
    assert isinstance(errors[1], Vanished)
    assert all(isinstance(error, threading.BrokenBarrierError) for error in errors[::2])
    assert loads(root) == 2
    assert save_on_ranks(root, 3) == [None] * NUM_RANKS
    assert loads(root) == 3


# The disk refuses.


def fail_fsync(monkeypatch: pytest.MonkeyPatch, ending: str, code: int) -> None:
    """Makes flushing of files or folders whose path ends so fail."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(ending):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("ending", "rank"),
    [("shard_00001.safetensors", 1), ("index.json", 0), ("manifest.json", 0), ("/root", 0)],
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("step", [2, 3], ids=["overwrite", "new"])
def test_disk_refuses(
    ending: str, rank: int, code: int, step: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_fsync(patch, ending, code)
        started = time.monotonic()
        errors = save_on_ranks(root, step)
        assert time.monotonic() - started < 10
    for error in errors:
        assert isinstance(error, CheckpointSaveFailed), error
        assert f"rank {rank}: " in str(error)
        assert os.strerror(code) in str(error)
        assert f"{ending}'" in str(error)
    assert loads(root) in (2, step)
    assert loads(root, 1) == 1
    assert save_on_ranks(root, 4) == [None] * NUM_RANKS
    assert loads(root) == 4


def test_rename_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if (
            path.name.startswith(".iter")
            and target.name == "iter_0000002"
            and "repl" not in path.name
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, target)

    before = (root / "iter_0000002" / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        assert all(isinstance(e, CheckpointSaveFailed) for e in save_on_ranks(root, 2))
    assert (root / "iter_0000002" / "manifest.json").read_bytes() == before
    assert loads(root) == 2


def test_two_savers_of_one_root(root: Path) -> None:
    with (
        CheckpointRoot(root).locked(),
        pytest.raises(CheckpointSaveFailed, match="another process is saving"),
    ):
        CheckpointManager(root).save(3, content(3))
    CheckpointManager(root).save(3, content(3))


# Background saves.


def test_background_save_holds_the_state_of_the_call(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 2, 3):  # overlapping saves run one after the other
        state = content(step)
        manager.save(step, state, asynchronous=True)
        for tensor in state["model"].values():
            tensor.fill_(-1)
        state["note"].append("changed")
    manager.wait()
    assert manager.steps() == [1, 2, 3]
    assert [loads(tmp_path, step) for step in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("nbytes", [1, 1_000_000], ids=["less than it has", "more"])
def test_reserving_leaves_a_pending_save_alone(
    nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path)
    reserved = threading.Event()

    def save_late(*rest: Any) -> None:
        reserved.wait()
        save_state(*rest)

    monkeypatch.setattr(checkpoint_manager, "save_state", save_late)
    step = 0xFFFFFD  # as a float its first byte in memory is not zero
    manager.reserve(2_000)
    manager.save(step, content(step), asynchronous=True)
    manager.reserve(nbytes)
    manager._host_copy._wait()
    reserved.set()
    manager.wait()
    assert loads(tmp_path) == step


def test_background_error_surfaces_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path)
    with monkeypatch.context() as patch:
        fail_fsync(patch, "index.json", errno.ENOSPC)
        manager.save(1, content(1), asynchronous=True)
        with pytest.raises(CheckpointSaveFailed, match=r"index\.json"):
            manager.wait()
        manager.wait()
        manager.save(1, content(1), asynchronous=True)
        with pytest.raises(CheckpointSaveFailed, match=r"index\.json"):
            manager.save(2, content(2))
    manager.save(3, {"bad": object()}, asynchronous=True)
    with pytest.raises(ValueError, match="'bad': cannot store"):
        manager.load(content(-1))
    assert manager.steps() == []
    manager.save(2, content(2))
    assert loads(tmp_path) == 2


EXIT_WHILE_PENDING = """
import sys, time, torch
from pathlib import Path
from primitives.checkpoint import CheckpointManager, manager
real = manager.save_state
manager.save_state = lambda *rest: (time.sleep(0.5), real(*rest))
CheckpointManager(Path(sys.argv[1])).save(7, {"x": torch.ones(4)}, asynchronous=True)
"""


def test_exit_waits_for_the_background_save(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXIT_WHILE_PENDING, str(tmp_path)]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PYTHONPATH": os.getcwd()})
    state = {"x": torch.zeros(4)}
    assert CheckpointManager(tmp_path).load(state) == 7
    assert state["x"].tolist() == [1, 1, 1, 1]
