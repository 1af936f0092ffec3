"""bootstrap.py beside a torch that is already there."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import bootstrap


def python_with(tmp_path: Path, probe: str) -> str:
    """An interpreter whose answer about torch is ``probe``."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{probe}'\n")
    python.chmod(0o755)
    return str(python)


def test_the_torch_of_an_interpreter_is_found() -> None:
    site_packages = str(Path(torch.__file__).parent.parent)
    assert bootstrap.existing_torch(sys.executable) == (version("torch"), site_packages)


@pytest.mark.parametrize("release", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu"])
def test_a_supported_torch_is_used(release: str, tmp_path: Path) -> None:
    python = python_with(tmp_path, f"{release} /site packages")
    assert bootstrap.existing_torch(python) == (release, "/site packages")


@pytest.mark.parametrize("release", ["2.10.2", "2.14.0", "1.13.1+cu117"])
def test_another_torch_is_named_and_not_used(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bootstrap.existing_torch(python_with(tmp_path, f"{release} /x")) is None
    assert f"torch {release} is not supported (need >= 2.11, < 2.14)" in capsys.readouterr().err


def test_no_torch(tmp_path: Path) -> None:
    assert bootstrap.existing_torch(python_with(tmp_path, "")) is None


@pytest.mark.parametrize("torch_there", [False, True])
def test_no_second_torch_is_installed(
    torch_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    monkeypatch.setattr(bootstrap, "run", lambda *words: commands.append(tuple(map(str, words))))
    monkeypatch.setattr(bootstrap, "configure_mpi", lambda venv: None)
    major, minor = sys.version_info[:2]
    purelib = tmp_path / "lib" / f"python{major}.{minor}" / "site-packages"
    purelib.mkdir(parents=True)

    bootstrap.install_packages(("2.12.0", "/outer/site-packages") if torch_there else None)

    wanted = (tmp_path / "requirements.txt").read_text().splitlines()
    link = purelib / "outer_torch.pth"
    assert any(line.startswith("torch==") for line in wanted) != torch_there
    assert any(line.startswith("numpy==") for line in wanted)
    assert ("--ignore-installed" in commands[0]) == torch_there
    assert link.exists() == torch_there
    if torch_there:
        assert link.read_text() == "/outer/site-packages\n"
