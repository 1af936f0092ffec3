"""The commands: outcome, exit code, one clear line for each user error, JSON alone on stdout."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from primitives import devices
from scenarios import cli, commands, runner
from scenarios.failures import RankFailure, RunFailed
from scenarios.golden import read_golden
from scenarios.machine import machine_key
from scenarios.metrics_file import MetricsWriter
from scenarios.run_context import RunContext
from scenarios.schema import Scenario, load_scenario
from scenarios.verdict import Check, Verdict
from scenarios.worker import Job
from tests import toy_engine

ROOT = Path(__file__).resolve().parent.parent
Testbed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def testbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Testbed:
    """Runs a command line on the toy engine with six steps, in a folder of its own.

    Returns exit code, stdout, stderr.
    """
    # Ranks import the toy engine from the working folder, runs/ and golden/ lie in tmp_path.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    shipped = Scenario.golden_path.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Scenario,
        "golden_path",
        property(lambda self: tmp_path / "golden" / self.name / shipped(self).name),
    )

    def load(case: str, **choices: Any) -> Scenario:
        scenario = load_scenario(case, **choices)
        training = scenario.training.model_copy(update={"train_iters": 6})
        checkpoint = scenario.checkpoint.model_copy(update={"save_interval": 3})
        return scenario.model_copy(update={"training": training, "checkpoint": checkpoint})

    monkeypatch.setattr(commands, "load_scenario", load)

    def call(*arguments: str, engine: str = "train") -> tuple[int, str, str]:
        monkeypatch.setattr(runner, "ENGINE", f"tests.toy_engine:{engine}")
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trains in this process, as the one rank of a group, instead of launching ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def launch(job: Job, *, world_size: int, **options: Any) -> None:
        assert world_size == 1
        writer = MetricsWriter(Path(job.run_dir) / "metrics.jsonl")
        run = RunContext(Path(job.run_dir), Path(job.checkpoint_dir), job.resume, writer.log)
        train = getattr(toy_engine, job.engine.split(":")[1])
        train(Scenario.model_validate_json(job.scenario), run)

    monkeypatch.setattr(runner, "launch", launch)
    yield
    dist.destroy_process_group()


@pytest.fixture
def golden_path(tmp_path: Path) -> Path:
    name = load_scenario("S1", scale="ci").name
    return tmp_path / "golden" / name / "golden_values_canonical.json"


def one_error_line(errors: str) -> str:
    """The single line of a user error; anything more, such as a traceback, fails."""
    assert errors.startswith("testbed: error: ")
    assert errors.count("\n") == 1
    return errors


def test_record_on_two_ranks_then_run_on_one(
    testbed: Testbed, golden_path: Path, tmp_path: Path
) -> None:
    code, out, _ = testbed("record", "S1", "--layout", "dp2", "--out", "first")
    assert (code, "recorded, for the first time" in out) == (0, True)
    recorded = read_golden(golden_path, "ci")
    assert recorded.provenance["layout"] == "tp1,pp1,dp2"
    assert recorded.provenance["command"] == "testbed record S1 --layout dp2 --out first"
    assert set(recorded.provenance["versions"]) >= {"python", "torch", "numpy"}
    assert "iteration-time" not in recorded.metrics
    assert recorded.metrics["num-zeros"].values == {1: 1, 2: "nan", 3: 3, 4: 4, 5: 5, 6: 6}

    code, out, _ = testbed("run", "S1", "--layout", "dp1", "--json", "--out", "second")
    verdict = json.loads(out)
    assert (code, verdict["verdict"], verdict["layout"]) == (0, "pass", "tp1,pp1,dp1")
    names = [check["name"] for check in verdict["checks"]]
    assert names == ["complete and finite", "resume", "golden"]
    assert json.loads((tmp_path / "second" / "verdict.json").read_text()) == verdict
    assert (tmp_path / "second" / "run2" / "logs" / "rank_0.log").exists()
    code, out, _ = testbed("compare", golden_path, tmp_path / "second")
    assert (code, out) == (0, "PASS  42 values, all bits equal\n")

    layouts = ("--layout", "dp2", "--resume-layout", "dp1")
    code, out, _ = testbed("run", "S1", *layouts, "--out", "third")
    assert code == 0, out
    assert "run 2: steps 4..6, resumed in tp1,pp1,dp1" in out
    job = json.loads((tmp_path / "third" / "run2" / "job.json").read_text())
    assert json.loads(job["scenario"])["layout"]["dp"] == 1


@pytest.mark.usefixtures("in_process")
def test_native_arithmetic_has_goldens_of_its_own(
    testbed: Testbed, golden_path: Path, tmp_path: Path
) -> None:
    case = ("S1", "--layout", "dp1", "--arithmetic", "native")
    code, _, errors = testbed("run", *case)
    assert code == 2
    assert "testbed record S1 --scale ci --arithmetic native" in one_error_line(errors)
    assert testbed("record", *case, "--out", "first")[0] == 0
    recorded = read_golden(golden_path.with_name(f"golden_values_{machine_key()}.json"), "ci")
    assert not golden_path.exists()
    assert recorded.arithmetic == "native"
    assert min(recorded.metrics["iteration-time"].values.values()) > 0

    code, out, _ = testbed("run", *case, "--out", "second")
    assert (code, "within derived tolerances; median step time " in out) == (0, True)
    code, out, _ = testbed("run", *case, "--resume-layout", "dp1", "--out", "third")
    assert (code, "pass  resume: 18 values, within derived tolerances" in out) == (0, True)
    code, out, _ = testbed("run", *case, engine="train_forgetting")
    assert (code, "FAIL  resume: 1 of 21 differ" in out) == (1, True)
    code, out, _ = testbed("record", *case, "--out", "fourth")
    assert (code, "unchanged, not written" in out) == (0, True)
    code, _, errors = testbed("run", "S1", "--layout", "dp1")
    assert (code, "golden_values_canonical.json does not exist" in errors) == (2, True)


@pytest.mark.usefixtures("in_process")
def test_one_ulp_in_the_golden_is_found_and_recorded_anew(
    testbed: Testbed, golden_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert testbed("record", "S1", "--layout", "dp1", "--out", "first")[0] == 0
    loss = read_golden(golden_path, "ci").metrics["lm loss"].values[5]
    near = loss + 2.0**-23
    golden_path.write_text(golden_path.read_text().replace(repr(loss), repr(near)))

    code, out, _ = testbed("compare", golden_path, tmp_path / "first", "--json")
    (difference,) = json.loads(out)["differences"]
    assert code == 1
    assert (difference["metric"], difference["step"]) == ("lm loss", 5)
    assert (difference["expected"], difference["actual"]) == (repr(near), repr(loss))
    assert (difference["ulp"], difference["ulp_format"]) == (1, "fp32")

    code, out, _ = testbed("run", "S1", "--layout", "dp1", "--out", "second")
    assert code == 1
    assert "FAIL  golden: 1 of 42 differ" in out
    assert f"lm loss step 5: differs: expected {near!r}, got {loss!r}, 1 ulp (fp32)" in out

    code, out, _ = testbed("record", "S1", "--layout", "dp1", "--out", "third", "--json")
    recording = json.loads(out)
    assert (code, recording["written"], len(recording["changes"])) == (0, True, 1)
    before = golden_path.read_bytes()
    code, out, _ = testbed("record", "S1", "--layout", "dp1", "--out", "fourth")
    assert (code, "unchanged, not written" in out) == (0, True)
    assert golden_path.read_bytes() == before

    # Values of changed code that nobody can find again are recorded anew once it is committed.
    trees = [{"dirty": True}, {"dirty": False}, {"dirty": False}]
    monkeypatch.setattr(commands, "provenance", lambda *_: trees.pop(0))
    golden_path.unlink()
    for written in (True, True, False):
        out_dir = f"with {len(trees)} trees left"
        _, out, _ = testbed("record", "S1", "--layout", "dp1", "--out", out_dir, "--json")
        assert json.loads(out)["written"] == written
    assert read_golden(golden_path, "ci").provenance == {"dirty": False}


@pytest.mark.usefixtures("in_process")
def test_a_resume_that_differs_fails_and_is_not_recorded(
    testbed: Testbed, golden_path: Path
) -> None:
    code, out, _ = testbed("record", "S1", "--layout", "dp1", engine="train_forgetting")
    assert code == 1
    assert "FAIL  resume: 1 of 21 differ" in out
    assert "lm loss step 5" in out
    assert "refused: not recorded" in out
    assert not golden_path.exists()


@pytest.mark.usefixtures("in_process")
def test_a_nan_loss_fails_and_is_not_recorded(testbed: Testbed, golden_path: Path) -> None:
    code, out, _ = testbed("record", "S1", "--layout", "dp1", engine="train_to_nan")
    assert code == 1
    assert "FAIL  complete and finite: lm loss step 4 is nan" in out
    assert not golden_path.exists()


def test_a_lost_rank_is_exit_3_and_the_last_checkpoint_stays(
    testbed: Testbed, golden_path: Path, tmp_path: Path
) -> None:
    arguments = ("record", "S1", "--layout", "dp2", "--out", "run", "--json")
    code, out, errors = testbed(*arguments, engine="train_and_kill_rank_1")
    assert code == 3
    document = json.loads(out)
    assert document["exit_code"] == 3
    assert document["error"]["last_step"] == 4
    assert document["error"]["ranks"][0]["signal"] == "SIGKILL"
    assert "testbed: error: rank 1 was lost, killed by SIGKILL after step 4" in errors
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert verdict["verdict"] == "run failed"
    assert runner.drop_last_checkpoint(tmp_path / "run" / "checkpoints", 6) == 3
    assert not golden_path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "S1"), "no golden recorded: .*record it with: testbed record S1 --scale ci"),
        (("run", "S1x"), "S1x"),
        (("run",), "expected either CASE or --all"),
        (("run", "S1", "--all"), "expected either CASE or --all"),
        (("run", "S1", "--layuot", "dp2"), "--layuot.*--layout"),
        (("run", "S1", "--layout", "dp3"), "dp"),
        (("run", "S1", "--layout", "four"), "four"),
        (("run", "S1", "--scale", "huge"), "huge"),
        (("run", "S1", "--master-port", "70000"), "70000"),
        (("run", "S1", "--data", "no/such/data"), "no/such/data"),
        (("run", "no/such/model_config.yaml"), "no/such/model_config.yaml"),
        (("jump",), "jump"),
        (("compare", "none.json", "none.json"), "none.json: golden file not found"),
        (("compare", "a", "b", "--metric", "lm loss"), "--rules megatron"),
        (("data", "build", "none.txt", "--tokenizer", "bytes", "-o", "x"), "none.txt"),
        (("data", "build", "-o", "x"), "TEXT"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    testbed: Testbed, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, errors = testbed(*arguments)
    assert (code, out) == (2, "")
    assert re.search(message, one_error_line(errors))
    assert list(tmp_path.iterdir()) == []

    code, out, _ = testbed(*arguments, "--json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2


def test_three_ranks_of_tp_2_are_refused(testbed: Testbed, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    (s1,) = [info for info in commands.list_scenarios() if info.alias == "S1"]
    shutil.copytree(s1.path, folder)
    file = folder / "scale_ci.yaml"
    text = file.read_text().replace("RANKS: 4", "RANKS: 3")
    file.write_text(text + "  --tensor-model-parallel-size: 2\n")
    code, _, errors = testbed("run", folder)
    assert code == 2
    assert "3 ranks" in one_error_line(errors)


def test_a_corrupt_golden_is_refused_before_anything_runs(
    testbed: Testbed, golden_path: Path, tmp_path: Path
) -> None:
    golden_path.parent.mkdir(parents=True)
    golden_path.write_text('{"schema": 1, "scales"')
    for command in ("run", "record"):
        code, out, errors = testbed(command, "S1")
        assert (code, out) == (2, "")
        assert f"{golden_path}: corrupt JSON" in one_error_line(errors)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("S1",), "--device cuda: no GPU today"),
        (("S1", "--arithmetic", "native"), "--device cuda: expected canonical arithmetic, got nat"),
        (("S3",), "--device cuda: .* is inference; training runs there"),
    ],
)
def test_a_device_that_cannot_train_is_refused(
    testbed: Testbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(devices, "missing_gpu", lambda: "no GPU today")
    code, out, errors = testbed("record", *arguments, "--device", "cuda")
    assert (code, out) == (2, "")
    assert re.search(message, one_error_line(errors))
    assert list(tmp_path.iterdir()) == []


def test_ranks_share_the_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "missing_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [devices.cuda_device(rank).index for rank in range(4)] == [0, 1, 0, 1]
    assert [device.index for device in current] == [0, 1, 0, 1]
    monkeypatch.setattr(devices, "missing_gpu", lambda: "no GPU today")
    with pytest.raises(ValueError, match="expected cuda to be usable, but no GPU today"):
        devices.cuda_device(0)


def test_a_busy_port_is_exit_2_and_leaves_nothing(testbed: Testbed, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, out, errors = testbed("record", "S1", "--master-port", port)
    assert (code, out) == (2, "")
    assert list(tmp_path.iterdir()) == []
    assert f"port {port}" in one_error_line(errors)


def test_a_folder_with_leftovers_is_refused(testbed: Testbed, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("x")
    code, _, errors = testbed("record", "S1", "--out", "old")
    assert code == 2
    assert "new or empty folder" in one_error_line(errors)


def test_list_and_doctor(testbed: Testbed) -> None:
    code, out, _ = testbed("list", "--json")
    rows = {(row["alias"], row["scale"]): row for row in json.loads(out)}
    assert code == 0
    assert rows["S1", "ci"]["num_ranks"] == 4
    assert rows["S1", "ci"]["golden"] is False
    code, out, _ = testbed("list", "--names")
    assert sorted(out.split()) == sorted({row["name"] for row in rows.values()})
    code, out, _ = testbed("doctor", "--json")
    facts = json.loads(out)
    assert (code, facts["ready"]) == (0, True)
    assert facts["findings"]["native code"]["value"].startswith("kernels for ")


def test_doctor_says_when_shared_memory_is_too_small(
    testbed: Testbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(total=1 << 20, free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, out, _ = testbed("doctor")
    assert code == 2
    assert out.splitlines()[-1] == (
        "not ready: /dev/shm: 1 MiB free of 1 MiB, expected at least 64 MiB"
    )


def test_doctor_says_who_can_meet_on_a_gpu_and_reach_it() -> None:
    from scenarios.doctor import describe_gpu

    gpu = {"name": "H200", "capability": (9, 0), "memory_nbytes": 140 << 30}
    assert describe_gpu({**gpu, "shared": True, "num_peers": 3, "num_linked": 2}) == (
        "H200 (sm_90, 140 GiB; several ranks; peers: 2 by NVLink, 1 by PCIe)"
    )
    alone = describe_gpu({**gpu, "shared": False, "num_peers": 0, "num_linked": 0})
    assert "one rank only (its compute mode)" in alone


@pytest.mark.usefixtures("in_process")
def test_data_build_then_run_judges_only_the_invariants(testbed: Testbed, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n\n" * 400)
    arguments = ("data", "build", "text.txt", "--tokenizer", "bytes", "-o", "tokens", "--json")
    code, out, _ = testbed(*arguments)
    assert code == 0
    assert json.loads(out)["num_documents"] == 400
    code, out, _ = testbed("run", "S1", "--layout", "dp1", "--data", "tokens")
    assert code == 0
    assert "own data has no golden: only the invariants were judged" in out
    assert "  golden:" not in out


def test_megatron_rules_on_a_bare_file(testbed: Testbed, tmp_path: Path) -> None:
    def write(name: str, loss: float) -> Path:
        body = {"start_step": 1, "end_step": 2, "step_interval": 1}
        values = {"lm loss": {"1": loss, "2": loss}, "num-zeros": {"1": "nan", "2": "nan"}}
        path = tmp_path / name
        path.write_text(json.dumps({k: {**body, "values": v} for k, v in values.items()}))
        return path

    golden, near, far = write("golden.json", 10.0), write("near.json", 10.4), write("far", 12.0)
    assert testbed("compare", golden, near, "--rules", "megatron")[0] == 0
    assert testbed("compare", golden, far, "--rules", "megatron")[0] == 1
    assert testbed("compare", golden, near)[0] == 1
    _, out, _ = testbed("compare", golden, far, "--rules", "megatron", "--json")
    assert json.loads(out)["verdict"] == "fail"


def test_all_goes_on_after_a_case_that_cannot_run(
    testbed: Testbed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost = RankFailure(1, "lost", "killed", 3, "SIGKILL", None, "log")

    def judge(case: str, **choices: Any) -> Verdict:
        if case == "lost":
            raise RunFailed([lost], last_step=3, log_dir=tmp_path)
        if case == "missing":
            raise ValueError("no golden recorded")
        check = Check("golden", case == "good", "")
        return Verdict(case, "ci", "dp1", 1, tmp_path, (), (check,))

    monkeypatch.setattr(commands, "judge_case", judge)
    for cases, worst in ((["good"], 0), (["bad", "good"], 1), (["missing", "bad"], 2)):
        monkeypatch.setattr(commands, "all_cases", lambda scale, cases=cases: cases)
        assert testbed("run", "--all")[0] == worst
    monkeypatch.setattr(commands, "all_cases", lambda scale: ["lost", "missing", "good"])
    code, out, _ = testbed("run", "--all", "--json")
    assert (code, [row["exit_code"] for row in json.loads(out)]) == (3, [3, 2, 0])


def test_a_verdict_without_checks_does_not_pass(tmp_path: Path) -> None:
    assert Verdict("case", "ci", "dp1", 1, tmp_path, (), ()).exit_code == 1


def test_output_that_nobody_reads_is_no_mismatch() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "scenarios", "list"]
    with os.fdopen(writer, "w") as closed:
        result = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (3, b"")


def test_help_and_usage_do_not_wait_for_torch() -> None:
    program = (
        "import sys\nfrom scenarios.cli import main\n"
        "code = main(sys.argv[1:])\nassert 'torch' not in sys.modules\nsys.exit(code)"
    )
    for arguments, code in (["--help"], 0), (["list"], 0), (["run", "S9"], 2):
        command = [sys.executable, "-c", program, *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
