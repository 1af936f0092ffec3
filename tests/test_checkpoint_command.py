"""``testbed checkpoint``: what it lists, and that it finds damage."""

import json
from pathlib import Path

import pytest
import torch

from primitives.checkpoint import CheckpointManager
from scenarios.cli import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    manager = CheckpointManager(tmp_path)
    for step in (20, 10):
        manager.save(step, {"w": torch.full((3, 4), float(step)), "x": step})
    return tmp_path


def test_list_and_verify(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("list", "verify"):
        assert main(["checkpoint", command, str(root), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["step"], row["latest"]) for row in rows] == [(10, True), (20, False)]
        for row in rows:
            folder = Path(row["path"])
            assert row["nbytes"] == sum(path.stat().st_size for path in folder.iterdir())
            kinds = ("world_size", "num_files", "num_tensors", "numel", "problem")
            assert [row[kind] for kind in kinds] == [1, 3, 1, 12, None]
    assert main(["checkpoint", "verify", str(root / "iter_0000010")]) == 0
    out = capsys.readouterr().out
    assert "verified, latest" in out
    assert "20" not in out


def test_damage_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "iter_0000020" / "shard_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["checkpoint", "list", str(root)]) == 0  # sizes are right
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(root)]) == 1
    out = capsys.readouterr().out
    assert f"! {path}: SHA-256" in out
    assert out.count("damaged") == 1
    (root / "iter_0000010" / "manifest.json").unlink()
    assert main(["checkpoint", "list", str(root), "--json"]) == 1
    problems = [row["problem"] for row in json.loads(capsys.readouterr().out)]
    assert "manifest.json: missing" in problems[0]
    assert problems[1] is None


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "iter_0000001"):
        assert main(["checkpoint", "verify", str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "checkpoint", "-e", "13M", "-n", "1", "--ranks", "2", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["checkpoint"]
    assert found["nbytes"] == 12 * 1024 * 1024
    assert list(found["figures"]) == ["dcp.save", "ours", "ours async"]
    for figures in found["figures"].values():
        assert 0 < figures["blocked_s"] <= figures["save_s"]
    assert main([*arguments, "-e", "1M"]) == 2
    assert "-e 1048576, expected 1 or more rounds of 12582912" in capsys.readouterr().err
