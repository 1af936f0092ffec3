"""Real rank processes: a lost, failing or hanging rank ends the run in time and is named."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from primitives.env import SHM_DIR
from scenarios.failures import RankFailure, RunFailed
from scenarios.launch import launch
from scenarios.metrics_file import read_steps
from scenarios.schema import Scenario, load_scenario
from scenarios.worker import Job
from tests.ranks import rank_processes

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 60.0


def toy_scenario(train_iters: int = 6) -> Scenario:
    """S1 on two ranks with a few steps and a checkpoint in the middle."""
    scenario = load_scenario("S1", scale="ci", layout="dp2")
    training = scenario.training.model_copy(update={"train_iters": train_iters})
    checkpoint = scenario.checkpoint.model_copy(update={"save_interval": train_iters // 2})
    return scenario.model_copy(update={"training": training, "checkpoint": checkpoint})


def toy_job(folder: Path, engine: str) -> Job:
    (folder / "run1").mkdir()
    return Job(
        scenario=toy_scenario().model_dump_json(),
        run_dir=str(folder / "run1"),
        checkpoint_dir=str(folder / "checkpoints"),
        resume=False,
        engine=f"tests.toy_engine:{engine}",
    )


def wait_for(condition, what: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + TIME_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_run_reports_each_step_once_and_leaves_a_log_per_rank(tmp_path: Path) -> None:
    seen = []
    launch(
        toy_job(tmp_path, "train"), world_size=2, on_step=lambda step, metrics: seen.append(step)
    )
    assert seen == [1, 2, 3, 4, 5, 6]
    assert sorted(read_steps(tmp_path / "run1" / "metrics.jsonl")) == seen
    logs = sorted(path.name for path in (tmp_path / "run1" / "logs").iterdir())
    assert logs == ["rank_0.log", "rank_1.log"]
    assert rank_processes(tmp_path / "run1") == {}


def test_a_killed_rank_is_named_first_and_all_are_down_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shm").mkdir()
    monkeypatch.setenv(SHM_DIR.name, str(tmp_path / "shm"))
    start = time.monotonic()
    with pytest.raises(RunFailed) as caught:
        launch(toy_job(tmp_path, "train_and_kill_rank_1"), world_size=2)
    assert time.monotonic() - start < TIME_LIMIT_S
    failure = caught.value
    assert str(failure).startswith("rank 1 was lost, killed by SIGKILL after step 4; rank 0")
    assert [f.rank for f in failure.failures] == [1, 0]
    assert failure.failures[0].signal == "SIGKILL"
    assert failure.failures[1].type == "PeerLost"
    assert "all_reduce" in failure.failures[1].message
    assert str(tmp_path / "run1" / "logs") in str(failure)
    assert rank_processes(tmp_path / "run1") == {}
    assert list((tmp_path / "shm").iterdir()) == []
    json.dumps(failure.as_json())


def test_ranks_that_we_kill_leave_no_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shm").mkdir()
    monkeypatch.setenv(SHM_DIR.name, str(tmp_path / "shm"))
    monkeypatch.setattr("scenarios.launch.GRACE_S", 1.0)
    with pytest.raises(RunFailed, match=r"rank 1 was lost, killed by SIGKILL"):
        launch(toy_job(tmp_path, "train_in_a_group_that_rank_1_never_joins"), world_size=2)
    assert list((tmp_path / "shm").iterdir()) == []


def test_an_error_on_one_rank_is_told_with_type_and_message(tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as caught:
        launch(toy_job(tmp_path, "train_and_raise_on_rank_1"), world_size=2)
    assert str(caught.value).startswith(
        "rank 1: ArithmeticError: a made-up error after step 1; rank 0"
    )
    assert "a made-up error" in (tmp_path / "run1" / "logs" / "rank_1.log").read_text()


def test_an_engine_that_does_not_exist_is_an_error_of_the_ranks(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"AttributeError.* before the first step"):
        launch(toy_job(tmp_path, "no_such_function"), world_size=2)


def test_a_hang_ends_at_the_limit_with_the_stacks_in_the_logs(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"hang: no step for 4 s .* after step 1"):
        launch(toy_job(tmp_path, "train_and_hang"), world_size=2, timeout_s=4.0)
    assert "train_and_hang" in (tmp_path / "run1" / "logs" / "rank_1.log").read_text()
    assert rank_processes(tmp_path / "run1") == {}


def test_a_busy_port_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 cannot be used: Address"):
            launch(toy_job(tmp_path, "train"), world_size=2, master_port=port)
    assert list((tmp_path / "run1").iterdir()) == []


LAUNCHER = """
import os, sys
from pathlib import Path
from tests.test_launch import toy_job
from scenarios.launch import launch
launch(toy_job(Path(sys.argv[1]), "train_and_hang"), world_size=2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_do_not_outlive_the_launcher(tmp_path: Path, number: int) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    run_dir = tmp_path / "run1"
    try:
        metrics = run_dir / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text(), "no step was logged")
        assert len(rank_processes(run_dir)) == 2
        launcher.send_signal(number)
        _, errors = launcher.communicate(timeout=TIME_LIMIT_S)
        wait_for(lambda: not rank_processes(run_dir), "ranks outlived the launcher")
    finally:
        launcher.kill()
    if number != signal.SIGKILL:
        assert f"interrupted by {signal.Signals(number).name} after step 1" in errors


def test_launch_works_outside_the_main_thread(tmp_path: Path) -> None:
    thread = threading.Thread(
        target=lambda: launch(toy_job(tmp_path, "train"), world_size=2), daemon=True
    )
    thread.start()
    thread.join(TIME_LIMIT_S)
    assert sorted(read_steps(tmp_path / "run1" / "metrics.jsonl")) == [1, 2, 3, 4, 5, 6]


def rank_failure(rank: int, kind: str, signal_name: str | None = None) -> RankFailure:
    return RankFailure(rank, kind, f"{kind} of {rank}", 3, signal_name, None, "log")


def test_the_root_cause_comes_first() -> None:
    failed = RunFailed(
        [
            rank_failure(0, "stopped"),
            rank_failure(1, "PeerLost"),
            rank_failure(2, "CollectiveTimeout"),
            rank_failure(3, "ValueError"),
            rank_failure(4, "lost", "SIGSEGV"),
        ],
        last_step=3,
        log_dir=Path("logs"),
    )
    assert [f.rank for f in failed.failures] == [4, 3, 2, 1, 0]
    assert str(failed) == (
        "rank 4 was lost, killed by SIGSEGV after step 3; rank 3: ValueError: ValueError of 3; "
        "rank 2: CollectiveTimeout: CollectiveTimeout of 2; logs: logs"
    )


def test_ranks_that_fail_alike_are_told_once() -> None:
    same = [RankFailure(r, "ValueError", "no", None, None, 1, "log", 9.0 - r) for r in (3, 0, 2)]
    failed = RunFailed(same, last_step=None, log_dir=Path("logs"))
    assert str(failed) == "rank 0, 2, 3: ValueError: no before the first step; logs: logs"
