"""The flight recorder: what it holds, when it is dumped, and what `testbed flight` makes of it."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from ranks import ProcessRanks, ThreadRanks, init

from primitives.env import FLIGHT_DIR
from scenarios import cli
from scenarios.cli import main
from scenarios.flight import merge, read_dumps


def records_of(reason: str = "test") -> list[dict[str, Any]]:
    from primitives.flight import snapshot

    document = snapshot(reason)
    assert document["reason"] == reason
    records: list[dict[str, Any]] = document["records"]
    return records


def test_records_hold_the_calls_and_their_sites() -> None:
    ranks = ThreadRanks(2)

    def call(backend: Any, rank: int) -> None:
        backend.allreduce([torch.ones(5)]).wait()
        backend.broadcast([torch.ones(3, dtype=torch.float64)]).wait()
        if rank == 0:
            backend.send([torch.ones(7)], 1, 4).wait()
        else:
            backend.recv([torch.ones(7)], 0, 4).wait()

    ranks(call)
    last = records_of()[-6:]
    ranks.close()
    for rank in range(2):
        mine = [r for r in last if r["rank"] == rank]
        assert [r["op"] for r in mine] == ["all_reduce", "broadcast", ["send", "recv"][rank]]
        assert [r["dtype"] for r in mine] == ["float32", "float64", "float32"]
        assert [r["numel"] for r in mine] == [5, 3, 7]
        assert [r["seq"] for r in mine] == [1, 2, 0]
        assert (mine[0]["reduce_op"], mine[1]["root"]) == ("sum", 0)
        assert (mine[2]["peer"], mine[2]["tag"]) == (1 - rank, 4)
        assert [r["state"] for r in mine] == ["done"] * 3
        assert all(0 < r["start_ns"] <= r["end_ns"] for r in mine)
        first = call.__code__.co_firstlineno
        assert mine[0]["site"].endswith(f"test_flight.py:{first + 1} in call")
        assert mine[1]["site"].endswith(f"test_flight.py:{first + 2} in call")
        assert mine[2]["site"].endswith(f"test_flight.py:{first + 4 + 2 * rank} in call")


def test_the_ring_keeps_the_last_2048() -> None:
    ranks = ThreadRanks(1)
    for i in range(2100):
        ranks.backends[0].allreduce([torch.ones(i % 7)]).wait()
    records = records_of()
    assert len(records) == 2048
    assert [r["seq"] for r in records] == list(range(53, 2101))
    ranks.close()


def test_sites_skip_torch_and_know_threads_and_modules(tmp_path: Path) -> None:
    from primitives import _C

    source = "\n\ndef outer(f):\n    return f()\n"
    module: dict[str, Any] = {}
    exec(compile(source, "/somewhere/user.py", "exec"), module)
    assert module["outer"](_C.call_site) == "/somewhere/user.py:4 in outer"
    # Two calls of one place, two places of one function, and a frame of torch between.
    assert module["outer"](_C.call_site) == "/somewhere/user.py:4 in outer"
    with_torch = torch.no_grad()(_C.call_site)
    assert module["outer"](with_torch) == "/somewhere/user.py:4 in outer"
    long = f"/{'x' * 300}/user.py"
    exec(compile(source, long, "exec"), module)
    site = module["outer"](_C.call_site)
    assert site.startswith("...xxx")
    assert site.endswith("x/user.py:4 in outer")
    assert len(site) == 159


def test_a_failure_is_dumped_and_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FLIGHT_DIR.name, str(tmp_path / "flight"))
    # A name of its own: groups of earlier tests may not have been collected yet.
    ranks = ThreadRanks(2, timeout_s=0.3, group_name="dumped")
    ranks.errors(lambda b, r: b.allreduce([torch.ones(4)]).wait() if r == 0 else None)
    ranks.close()
    (path,) = (tmp_path / "flight").iterdir()
    assert path.match(f"flight_rank_*_pid_{os.getpid()}.json")
    dump = json.loads(path.read_text())
    assert "reached the timeout of its call" in dump["reason"]
    assert dump["records"][-1]["state"] == "failed"
    result = CliRunner().invoke(cli.testbed, ["flight", str(tmp_path)], standalone_mode=False)
    assert result.return_value == 1
    told = " ".join(result.output.split())  # as wide as the terminal
    assert "reached the timeout of its call; missing: rank 1" in told
    assert "rank 1 is behind in group 'dumped'" in told
    assert "all_reduce(sum, float32, 4)" in result.output


def blocked() -> None:
    rank, _ = init(timeout_s=60)
    calls = []
    if rank == 0:
        signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))  # installed after ours: it rules
        dist.all_reduce(torch.ones(2))
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [1]
    else:
        dist.all_reduce(torch.ones(2))
    Path(f"ready{rank}").touch()
    if rank == 2:
        time.sleep(60)
    dist.all_reduce(torch.ones(6))


def test_sigusr1_dumps_a_blocked_process_and_merging_names_who_is_behind(tmp_path: Path) -> None:
    folder = tmp_path / "flight"
    ranks = ProcessRanks("test_flight:blocked", 3, tmp_path, env={FLIGHT_DIR.name: str(folder)})
    ranks.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    for rank in (1, 2):
        ranks.processes[rank].send_signal(signal.SIGUSR1)
    while len(list(folder.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(process.poll() is None for process in ranks.processes)
    for rank in range(3):
        ranks.kill(rank)
    merged = merge(read_dumps([folder]))
    assert merged.ranks == [1, 2]
    problems = "\n".join(merged.problems)
    assert "rank 0 (pid" in problems
    assert "left no dump; seen by rank 1 as running, inside collective 2" in problems
    assert "rank 2 is behind in group" in problems
    assert "after collective 1 of group" in problems
    assert "in blocked" in problems
    last = merged.steps[-1]
    assert (last.seq, last.by_rank[1]["state"]) == (2, "started")
    assert last.by_rank[1]["numel"] == 6


def test_a_handler_that_was_there_before_is_still_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import glob, os, signal, sys, time
calls = []
signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
import torch, torch.distributed as dist
from datetime import timedelta
from primitives import _C
backend = _C.Backend(dist.HashStore(), 0, 1, _C.Backend.Options(timedelta(seconds=5)))
os.kill(os.getpid(), signal.SIGUSR1)
deadline = time.monotonic() + 10
while not glob.glob(sys.argv[1] + "/*.json"):
    assert time.monotonic() < deadline
    time.sleep(0.01)
print(calls)
"""
    import subprocess
    import sys

    folder = tmp_path / "flight"
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, FLIGHT_DIR.name: str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.strip() == "[1]", run.stderr


def test_nothing_is_written_when_nobody_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(FLIGHT_DIR.name, raising=False)
    monkeypatch.chdir(tmp_path)
    ranks = ThreadRanks(2, timeout_s=0.2)
    ranks.errors(lambda b, r: b.barrier().wait() if r == 0 else None)
    ranks.close()
    assert list(tmp_path.iterdir()) == []


# ---- merging made-up dumps


def record(rank: int, seq: int, **changes: Any) -> dict[str, Any]:
    return {
        "group": "g", "rank": rank, "seq": seq, "op": "all_reduce", "reduce_op": "sum",
        "dtype": "float32", "numel": 8, "root": -1, "peer": -1, "tag": 0, "state": "done",
        "start_ns": 100 * seq + rank, "end_ns": 100 * seq + 50, "site": f"a.py:{seq} in f",
        **changes,
    }  # fmt: skip


def make_dump(rank: int, records: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "version": 1, "reason": "", "rank": rank, "pid": 10 + rank, "host": "h", "boot": "b",
        "time_ns": 1000, "groups": [], "records": records, **changes,
    }  # fmt: skip


def test_equal_calls_are_no_problem_and_come_in_order() -> None:
    dumps = [make_dump(r, [record(r, s) for s in (1, 2, 3)]) for r in range(3)]
    merged = merge(dumps)
    assert merged.problems == []
    assert [step.seq for step in merged.steps] == [1, 2, 3]
    assert [sorted(step.by_rank) for step in merged.steps] == [[0, 1, 2]] * 3


@pytest.mark.parametrize(
    "change",
    [{"op": "broadcast"}, {"dtype": "int8"}, {"numel": 9}, {"reduce_op": "max"}, {"root": 1}],
)
def test_a_different_call_is_told_with_both_sites(change: dict[str, Any]) -> None:
    dumps = [make_dump(0, [record(0, 1)]), make_dump(1, [record(1, 1, site="b.py:9", **change)])]
    (problem,) = merge(dumps).problems
    assert problem.startswith("collective 1 of group 'g' differs: rank 0: all_reduce(sum, float32")
    assert "at a.py:1 in f; rank 1: " in problem
    assert problem.endswith("at b.py:9")


def test_uneven_parts_are_no_difference() -> None:
    dumps = [make_dump(r, [record(r, 1, op="all_gather", numel=3 + r)]) for r in range(2)]
    assert merge(dumps).problems == []


def test_a_message_that_nobody_took_is_told() -> None:
    sent = record(0, 0, op="send", reduce_op="", peer=1, tag=5, state="queued", end_ns=0)
    (problem,) = merge([make_dump(0, [sent, sent])]).problems
    assert problem == (
        "rank 0 of group 'g' never finished send(float32, 8, to rank 1, tag 5) at a.py:0 in f, "
        "2 times"
    )


def test_of_two_dumps_of_one_process_the_newer_counts(tmp_path: Path) -> None:
    for name, time_ns in (("a", 5), ("b", 9)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "flight_rank_0_pid_10.json"
        path.write_text(json.dumps(make_dump(0, [record(0, time_ns)], time_ns=time_ns)))
    (dump,) = read_dumps([tmp_path])
    assert dump["records"][0]["seq"] == 9


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"version": 2}'])
def test_what_is_no_dump_is_an_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "flight_rank_0_pid_1.json"
    path.write_text(text)
    assert main(["flight", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    assert main(["flight", str(tmp_path / "none")]) == 2


def test_recording_from_many_threads_while_it_is_read() -> None:
    groups = [ThreadRanks(1) for _ in range(4)]
    stop = threading.Event()

    def call(backend: Any) -> None:
        while not stop.is_set():
            backend.allreduce([torch.ones(3)]).wait()

    threads = [threading.Thread(target=call, args=(g.backends[0],)) for g in groups]
    for thread in threads:
        thread.start()
    for _ in range(30):
        for seen in records_of():
            assert seen["op"] != "nothing"
            assert seen["state"] in ("started", "done", "failed")
    stop.set()
    for thread in threads:
        thread.join()
    for group in groups:
        group.close()
