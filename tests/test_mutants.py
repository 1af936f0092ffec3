"""A sample of the mutants is judged failed, and the script that plays them fails when it must."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "mutants"))

import run_mutants
from catalogue import MUTANTS
from mutant import Edit, Mutant, Play, Result, copy_tree, judge

SAMPLE = ("partials-rounded", "norm-without-a-bias", "bias-correction-off-by-one")
DIFFERENCE = {"metric": "grad-norm", "step": 1}


def document(detail: str, *differences: object) -> str:
    return json.dumps({"layouts": [{"detail": detail, "differences": differences}]})


@pytest.mark.timeout(600)
def test_a_sample_is_judged_failed(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_mutants.main([word for name in SAMPLE for word in ("--only", name)])
    out = capsys.readouterr().out
    assert code == 0, out
    assert out.count("judged failed") == len(SAMPLE)
    assert out.count("all bits equal") == 3  # the control, in each kind of play
    assert "grad-norm step 1: differs: expected 4.377" in out
    assert "params-digest step 11: differs" in out


def test_every_edit_fits_the_code(tmp_path: Path) -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        tree = run_mutants.edited(mutant, tmp_path / mutant.name)
        for edit in mutant.edits:
            ast.parse((tree / edit.file).read_text())


def test_an_edit_needs_its_text_exactly_once(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    with pytest.raises(ValueError, match=r"launch\.py: expected .* once, got it 0 times"):
        Edit("scenarios/launch.py", "no such text", "").apply(tree)
    with pytest.raises(ValueError, match=r"got it \d+ times.*follow the code:\nimport"):
        Edit("scenarios/launch.py", "import", "").apply(tree)


def mutant_of(old: str) -> Mutant:
    edit = Edit("scenarios/launch.py", old, "POLL_S = 0.06")
    return Mutant("slow", "nothing", Play("S1", "dp1"), (edit,))


def run_with(monkeypatch: pytest.MonkeyPatch, mutant: Mutant, *results: Result) -> int:
    outcomes = iter(results)
    monkeypatch.setattr(run_mutants, "MUTANTS", (mutant,))
    monkeypatch.setattr(run_mutants, "play", lambda *_: next(outcomes))
    return run_mutants.main([])


@pytest.mark.parametrize(
    ("control", "result", "complaint"),
    [
        (Result("pass", ""), Result("differs", "lm loss"), None),
        (Result("pass", ""), Result("noticed", "ReplicasDiffer"), None),
        (Result("pass", ""), Result("pass", "all bits equal"), "! SURVIVED slow"),
        (Result("pass", ""), Result("broken", "NameError"), "! BROKEN slow: NameError"),
        (Result("differs", "lm loss"), Result("differs", "x"), "! the unedited code, S1 dp1"),
    ],
)
def test_what_makes_the_script_fail(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    control: Result,
    result: Result,
    complaint: str | None,
) -> None:
    code = run_with(monkeypatch, mutant_of("POLL_S = 0.05"), control, result)
    out = capsys.readouterr().out
    assert code == (0 if complaint is None else 1)
    assert (complaint or "PASS") in out


def test_a_catalogue_that_does_not_fit_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, mutant_of("POLL_S = 7")) == 1
    assert "! mutant slow: scenarios/launch.py: expected the text" in capsys.readouterr().out


def test_an_unknown_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_mutants.main(["--only", "no-such-mutant"])
    assert ended.value.code == 2
    assert "no mutant 'no-such-mutant'; known: row-forward-sum" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "output", "outcome"),
    [
        (0, document(""), "pass"),
        (1, document("1 of 21 differ: grad-norm step 1", DIFFERENCE), "differs"),
        (3, document("rank 0: ReplicasDiffer: main of x; logs: /somewhere"), "noticed"),
        (3, document("rank 0: CheckpointCorrupt: exp_avg of x"), "noticed"),
        (3, document("rank 0: NameError: name 'x' is not defined"), "broken"),
        (2, document("refused"), "broken"),
        (1, document(""), "broken"),
        (1, "", "broken"),
    ],
)
def test_how_a_play_is_judged(code: int, output: str, outcome: Any) -> None:
    result = judge(code, output, "Traceback")
    assert result.outcome == outcome
    assert "/somewhere" not in result.first
