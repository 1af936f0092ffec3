"""``make gpu-check`` without a GPU fails and says why; it hides nothing that it left out."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

GPU = Path(__file__).parent / "gpu"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(GPU))
    spec = importlib.util.spec_from_file_location("gpu_check", GPU / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_fails_with_the_reason(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_machine

    monkeypatch.setattr(gpu_machine, "missing_gpu", lambda: "no GPU today")
    assert check.main() == 2
    assert capsys.readouterr().err == "gpu-check: error: no GPU today\n"


def test_a_failure_and_what_was_not_run_are_no_pass(check: ModuleType) -> None:
    passed, text = check.sanitized(None, "racecheck")
    assert not passed
    assert text == "racecheck: not run, compute-sanitizer was not found"
    assert check.run(["sh", "-c", "echo out; echo err >&2; exit 3"]) == (3, "out\nerr\n")
    assert check.last_line("first\n==== 3 passed, 1 skipped ====\n") == "3 passed, 1 skipped"


def test_the_players_of_rank_streams_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What only a machine with a GPU runs; linked without anything missing."""
    monkeypatch.syspath_prepend(str(GPU.parent))
    from gpu import gpu_ranks

    if not Path(gpu_ranks.NVCC).exists():
        pytest.skip(f"there is no nvcc at {gpu_ranks.NVCC}")
    assert gpu_ranks.build("sm_80", tmp_path / "rank_streams.so").play_on_gpu
