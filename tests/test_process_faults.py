"""Processes that die, hang or leave: the others end soon and say who it was; nothing is left."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import ProcessRanks, init


def loop_of_all_reduces() -> None:
    """Trains for ever; says when it has begun."""
    init(timeout_s=60)
    Path(f"begun{dist.get_rank()}").touch()
    while True:
        work = dist.all_reduce(torch.ones(50_000), async_op=True)
        work.wait()


def begin(folder: Path) -> ProcessRanks:
    ranks = ProcessRanks("test_process_faults:loop_of_all_reduces", 3, folder).start()
    deadline = time.monotonic() + 60
    while not all((folder / f"begun{r}").exists() for r in range(3)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return ranks


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_rank_is_named_by_all_others(tmp_path: Path, number: int) -> None:
    ranks = begin(tmp_path)
    victim = ranks.processes[1]
    victim.send_signal(number)
    start = time.monotonic()
    results = ranks.wait(30)
    assert time.monotonic() - start < 10
    assert results[1][0] == -number
    for code, output in (results[0], results[2]):
        assert code == 1
        assert f"PeerLost: rank 1 (pid {victim.pid})" in output
        assert "all_reduce" in output
    assert ranks.leftovers() == []


def interrupted() -> None:
    """Rank 0 waits for a rank that never comes, in a way that rank 1 (asleep) does not end."""
    rank, _ = init(timeout_s=60)
    dist.barrier()
    if rank == 1:
        time.sleep(30)
    Path("waits").touch()
    work = dist.all_reduce(torch.ones(3), async_op=os.environ["ASYNC"] == "1")
    if work is not None:
        work.wait()


@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_ctrl_c_ends_a_blocked_wait(tmp_path: Path, asynchronous: str) -> None:
    env = {"ASYNC": asynchronous}
    ranks = ProcessRanks("test_process_faults:interrupted", 2, tmp_path, env=env).start()
    while not (tmp_path / "waits").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    start = time.monotonic()
    ranks.processes[0].send_signal(signal.SIGINT)
    code, output = ranks.wait_for(0, 30)
    assert time.monotonic() - start < 6
    ranks.kill(1)
    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in output
    assert ranks.leftovers() == []


def dies_while_joining() -> None:
    if os.environ["TEST_RANK"] == "1":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if os.environ["TEST_RANK"] != "2":
        init(timeout_s=60)


def test_a_rank_that_dies_while_the_group_is_created_is_lost(tmp_path: Path) -> None:
    ranks = ProcessRanks("test_process_faults:dies_while_joining", 3, tmp_path).start()
    start = time.monotonic()
    _, output = ranks.wait_for(0)
    assert time.monotonic() - start < 20  # the deadline is 60
    ranks.wait()
    assert f"PeerLost: rank 1 (pid {ranks.processes[1].pid}), has died" in output
    assert ranks.leftovers() == []


def stopped_peer() -> None:
    rank, _ = init(timeout_s=1.0)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(3))


def test_a_stopped_rank_is_a_timeout_that_says_so(tmp_path: Path) -> None:
    ranks = ProcessRanks("test_process_faults:stopped_peer", 2, tmp_path).start()
    _, output = ranks.wait_for(0)
    ranks.kill(1)
    assert "CollectiveTimeout" in output
    assert "stopped" in output
    assert ranks.leftovers() == []


def leaves_without_a_word() -> None:
    rank, _ = init(timeout_s=60)
    dist.all_reduce(torch.ones(3))
    if rank == 0:
        dist.all_reduce(torch.ones(3), async_op=True)  # never waited for
        dist.isend(torch.ones(3), 1)
        raise RuntimeError("my own error")
    dist.all_reduce(torch.ones(3))
    value = torch.empty(3)
    dist.recv(value, 0)
    assert value.tolist() == [1, 1, 1]
    dist.all_reduce(torch.ones(3))


def test_a_crashed_rank_delivers_then_is_lost_and_nobody_hangs(tmp_path: Path) -> None:
    ranks = ProcessRanks("test_process_faults:leaves_without_a_word", 2, tmp_path).start()
    (code0, output0), (code1, output1) = ranks.wait(40)
    assert code0 == 1
    assert "my own error" in output0
    assert code1 == 1
    assert "PeerLost: rank 0" in output1
    assert ranks.leftovers() == []
