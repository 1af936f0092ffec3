"""``testbed run CASE --layouts``: one row each, the worst decides, one failure stops nobody."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scenarios import cli, layout_matrix
from scenarios.failures import RankFailure, RunFailed
from scenarios.golden import Metric, read_golden
from scenarios.layout import Layout
from scenarios.layout_matrix import working_layouts
from scenarios.runner import Played
from scenarios.schema import Scenario, load_scenario
from scenarios.verdict import Check

Play = Callable[..., Played]
COMPLETE = Check("complete and finite", True, "")


def play_golden(
    scenario: Scenario, out_dir: Path, options: object, resumed: Scenario | None = None
) -> Played:
    """What a right engine logs."""
    last = scenario.training.train_iters
    saving = (scenario.test_type, scenario.checkpoint.save_interval)
    assert saving == (("ckpt-resume", last // 2) if resumed else ("regular", None))
    metrics = {
        name: Metric(1, last, 1, {s: v for s, v in metric.values.items() if s <= last})
        for name, metric in read_golden(scenario.golden_path, "ci").metrics.items()
    }
    return Played(metrics, (COMPLETE,), ())


def play_badly(
    scenario: Scenario, out_dir: Path, options: object, resumed: Scenario | None = None
) -> Played:
    """Wrong with tp 2, dead with pp 2, incomplete with dp 8, or resumed wrongly there."""
    if scenario.layout.pp == 2:
        raise RunFailed(
            [RankFailure(1, "lost", "killed by SIGKILL", None, "SIGKILL", None, "log")],
            last_step=3,
            log_dir=out_dir,
        )
    played = play_golden(scenario, out_dir, options, resumed)
    if 8 in (scenario.layout.dp, resumed.layout.dp if resumed else 1):
        check = Check("complete and finite", False, "step 2 has no grad-norm")
        return Played(played.metrics, (check,), ())
    if scenario.layout.tp == 2:
        loss = played.metrics["lm loss"].values
        assert isinstance(loss[4], float)
        loss[4] += 2.0**-20
    return played


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command on S1 with another way to train; exit code, stdout, stderr."""

    def call(play: Play, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(layout_matrix, "play", play)
        code = cli.main(["run", "S1", "--out", str(tmp_path / "out"), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_all_means_every_working_layout_of_up_to_eight_ranks() -> None:
    texts = list(working_layouts("S1", "ci"))
    layouts = [Layout.parse(text) for text in texts]
    assert len(set(texts)) == len(texts) >= 40
    assert max(layout.world_size for layout in layouts) == 8
    for axis, degrees in {"tp": {1, 2, 4, 8}, "pp": {1, 2, 4}, "dp": {1, 2, 4, 8}}.items():
        assert {getattr(layout, axis) for layout in layouts} == degrees
    assert {layout.sp for layout in layouts} == {False, True}
    assert all((layout.zero1 is None) == (layout.dp == 1) for layout in layouts)
    with pytest.raises(ValueError, match="pp 8"):
        load_scenario("S1", scale="ci", layout="pp8")


def test_all_layouts_pass(run: Any) -> None:
    code, out, _ = run(play_golden, "--layouts", "all", "--steps", "6")
    *rows, summary = out.splitlines()
    assert code == 0
    assert [row.split()[0] for row in rows] == ["same"] * len(rows)
    assert f"PASS  {len(rows)} layouts: {len(rows)} same; 42 values each" in summary
    assert "the first 6 of 40 steps" in summary


def test_pairs_are_twelve_changes_of_layout(run: Any) -> None:
    code, out, _ = run(play_golden, "--layouts", "pairs", "--steps", "4")
    *rows, summary = out.splitlines()
    assert (code, len(rows)) == (0, 12)
    assert "PASS  12 layouts: 12 same; 28 values each" in summary
    pairs = [row.split()[1].split(">") for row in rows]
    working = set(working_layouts("S1", "ci"))
    assert all(saved != resumed and {saved, resumed} <= working for saved, resumed in pairs)
    assert len({saved for saved, _ in pairs}) == len({resumed for _, resumed in pairs}) == 12
    assert len({Layout.parse(saved).tp for saved, _ in pairs}) > 2


def test_a_pair_is_judged_by_both_of_its_runs(run: Any) -> None:
    code, out, _ = run(play_badly, "--layouts", "dp1 > dp4; dp1>dp8; dp1>tp3", "--steps", "2")
    assert [line.split()[:2] for line in out.splitlines()[:3]] == [
        ["same", "dp1>dp4"],
        ["differs", "dp1>dp8"],
        ["refused", "dp1>tp3"],
    ]
    assert code == 2
    assert "step 2 has no grad-norm" in out


def test_rows_say_what_is_wrong_and_the_worst_decides(run: Any, tmp_path: Path) -> None:
    layouts = "dp1; tp2,sp;pp2;dp8;tp3;dp1"
    code, out, err = run(play_badly, "--layouts", layouts, "--json")
    document = json.loads(out)
    assert code == document["exit_code"] == 3
    assert document == json.loads((tmp_path / "out" / "verdict.json").read_text())
    rows = {row["layout"]: row for row in document["layouts"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "dp1": "same",
        "tp2,sp": "differs",
        "pp2": "failed",
        "dp8": "differs",
        "tp3": "refused",
    }
    assert rows["tp2,sp"]["detail"].startswith("1 of 280 differ: lm loss step 4: differs: expected")
    assert "ulp (fp32)" in rows["tp2,sp"]["detail"]
    assert "rank 1" in rows["pp2"]["detail"]
    assert "step 2 has no grad-norm" in rows["dp8"]["detail"]
    assert rows["tp3"]["detail"].startswith("layout tp3,pp1,dp1: tp and etp must divide the 8")
    assert len(err.splitlines()) == 5


@pytest.mark.parametrize(
    ("layouts", "code"), [("dp1", 0), ("dp1;tp2", 1), ("dp1;tp3", 2), ("tp3;pp2;dp1", 3)]
)
def test_exit_codes(run: Any, layouts: str, code: int) -> None:
    assert run(play_badly, "--layouts", layouts)[0] == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layouts", "all", "--layout", "dp1"), "no --layout"),
        (("--layouts", "all", "--resume-layout", "dp1"), "no --layout, --resume-layout or --data"),
        (("--layouts", "all", "--data", "x"), "no --layout, --resume-layout or --data"),
        (("--layouts", "all", "--no-golden"), "a CASE with a golden"),
        (("--steps", "41"), "expected at most train_iters = 40"),
        (("--steps", "1", "--resume-layout", "dp1"), "expected at least 2 to resume between them"),
        (("--layouts", "dp1", "--steps", "41"), "expected at most train_iters = 40"),
        (("--layouts", "dp1", "--scale", "full"), "no golden recorded for scale full"),
    ],
)
def test_what_does_not_fit_is_refused(run: Any, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(play_golden, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_an_interruption_ends_all(run: Any) -> None:
    def interrupt(scenario: Scenario, out_dir: Path, *_: object) -> Played:
        raise RunFailed([], last_step=None, log_dir=out_dir, reason="SIGINT", interrupted=True)

    code, out, err = run(interrupt, "--layouts", "dp1;dp2")
    assert (code, out) == (3, "")
    assert "SIGINT" in err
