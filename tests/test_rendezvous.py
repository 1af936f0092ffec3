"""Ranks find each other under every launcher, and only those of their own job."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ranks import ROOT, run_threads

from primitives import rendezvous
from primitives.rendezvous import RankInfo, meet, rank_info

PROGRAM = """
import sys
import torch, torch.distributed as dist
import primitives.backend
dist.init_process_group("primitives")
x = torch.tensor([float(sys.argv[1])])
dist.all_reduce(x)
print(dist.get_rank(), dist.get_world_size(), x.item())
dist.destroy_process_group()
"""


def open_mpi(rank: int, world_size: int, job: str) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(world_size),
        "PMIX_NAMESPACE": job,
    }


def srun(rank: int, world_size: int, job: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(world_size),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": job,
    }


def test_two_jobs_at_once_do_not_meet(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI", "PMI", "SLURM"))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, value],
            env={
                **clean,
                "PYTHONPATH": str(ROOT),
                "TMPDIR": str(tmp_path),
                "OMP_NUM_THREADS": "1",
                **variables,
            },
            text=True,
            stdout=subprocess.PIPE,
        )
        for value, launcher, job in (("1", open_mpi, "a"), ("5", srun, "b"))
        for variables in (launcher(rank, 2, job) for rank in range(2))
    ]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert outputs == [
        ["0", "2", "2.0"],
        ["1", "2", "2.0"],
        ["0", "2", "10.0"],
        ["1", "2", "10.0"],
    ]
    assert list(tmp_path.iterdir()) == []


def infos(num: int, world_size: int) -> list[RankInfo]:
    return [RankInfo(r, world_size, r, f"test/{os.getpid()}") for r in range(num)]


def same_file(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(rendezvous, "_meeting_path", lambda info: path)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)


def test_a_stale_file_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "meeting.json"
    same_file(monkeypatch, path)
    # The pid lives, but it is another process than the one that wrote this.
    path.write_text(json.dumps({"port": 1, "pid": os.getpid(), "start": 17}))
    with pytest.raises(TimeoutError) as caught:
        meet(infos(2, 2)[1], timedelta(seconds=0.3))
    assert "rank 1 of 2: rank 0 did not come" in str(caught.value)

    def call(rank: int) -> Any:
        return meet(infos(2, 2)[rank], timedelta(seconds=20))

    stores = run_threads(2, call)
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    assert not path.exists()


def test_rank_0_says_how_many_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_file(monkeypatch, tmp_path / "meeting.json")
    with pytest.raises(TimeoutError) as caught:
        meet(infos(1, 3)[0], timedelta(seconds=0.3))
    assert "only 0 of the other 2 ranks came" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_contradicting_variables_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in open_mpi(4, 4, "job").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        rank_info()
    assert "OMPI_COMM_WORLD_RANK=4" in str(caught.value)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "two")
    with pytest.raises(ValueError):
        rank_info()


@pytest.mark.parametrize("module", ["backend", "rendezvous", "canonical", "collectives"])
def test_any_module_can_be_the_first_import(module: str, tmp_path: Path) -> None:
    """torch's autoload re-enters primitives while it is being imported; see [Note: autoload]."""
    info = tmp_path / "entry-0.dist-info"  # as an installation would declare it
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entry\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\nprimitives = primitives.backend:register\n"
    )
    code = f"import primitives.{module}, torch.distributed as d; print(d.Backend.backend_list)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert "'primitives'" in shown.stdout, shown.stderr
