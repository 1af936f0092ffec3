"""Scenario S3: its golden, what the comparison and the checks catch, and the commands."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from scenarios import bench_decode, cli
from scenarios.case_files import find_case
from scenarios.compare import compare_strict
from scenarios.data.tokenizer import load_tokenizer
from scenarios.engines.builtin import Trainer
from scenarios.golden import Metric, Metrics, read_golden, write_golden
from scenarios.inference.client import Completion
from scenarios.inference.model_files import read_model
from scenarios.inference.request import Request, Sampling
from scenarios.inference.throughput import compare_rounds
from scenarios.inference.workload import (
    check_completions,
    check_replicas,
    make_requests,
    metrics_of_completions,
)
from scenarios.layout import Layout
from scenarios.parallel.mesh import Mesh
from scenarios.schema import load_scenario

S3 = load_scenario("S3", scale="ci")
GOLDEN = read_golden(S3.golden_path, "ci")
Testbed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def testbed(capsys: pytest.CaptureFixture[str]) -> Testbed:
    """Runs a command line; exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_plays_and_equals_its_golden(testbed: Testbed, tmp_path: Path) -> None:
    code, out, err = testbed("run", "S3", "--out", str(tmp_path / "out"), "--json")
    verdict = json.loads(out)
    assert code == 0, (verdict, err)
    assert [check["name"] for check in verdict["checks"]] == [
        "complete and finite",
        "replicas busy",
        "round 2",
        "round 3",
        "other order, suspended",
        "KV blocks returned",
        "golden",
    ]
    assert "4032 values, all bits equal" in verdict["checks"][-1]["detail"]
    assert "first token p50/p90/p99" in verdict["runs"][1]["run"]
    assert verdict["note"].startswith("throughput ")


def test_a_case_without_a_model_plays_initial_weights(testbed: Testbed, tmp_path: Path) -> None:
    """They are those that training starts from."""
    case = tmp_path / "gpt" / "mine"
    case.mkdir(parents=True)
    shipped = find_case("S3").parent
    (case / "model_config.yaml").write_bytes((shipped / "model_config.yaml").read_bytes())
    scale = (shipped / "scale_ci.yaml").read_text().replace("RANKS: 8\n", "")
    (case / "scale_ci.yaml").write_text(scale)
    out = tmp_path / "out"
    code, text, err = testbed(
        *("run", str(case), "--layout", "dp2", "--no-golden", "--out", str(out), "--json")
    )
    verdict = json.loads(text)
    assert code == 0, (verdict, err)
    assert "initial weights" in verdict["runs"][0]["run"]
    model = read_model(out / "model").load(Mesh(Layout(), 0, {}))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trained = load_scenario(str(case), scale="ci", layout="dp1")
        trainer = Trainer(trained)
        trainer.gather.start()
        trainer.gather.finish()
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    finally:
        dist.destroy_process_group()


def test_the_golden_holds_what_the_shipped_model_was_asked() -> None:
    assert S3.inference is not None
    assert S3.inference.model_folder is not None
    model = read_model(S3.inference.model_folder)
    assert model.config == S3.model
    assert model.provenance["trained"]["data"]["tokenizer"] == "tokenizer.json"
    tokenizer = load_tokenizer(str(model.tokenizer))
    requests = make_requests(S3.inference, tokenizer, 128, S3.training.seed)
    assert len(requests) == 32
    assert len({len(request.prompt) for request in requests}) > 20
    assert len({request.prompt for request in requests}) == 32
    for request in requests:
        of = {name: GOLDEN.metrics[f"{request.id} {name}"].values for name in S3.metrics}
        sizes = {name: len(values) for name, values in of.items()}
        new = dict.fromkeys(("generated_tokens", "logprobs", "logits"), 24)
        assert sizes == {**new, "generated_text": 1, "prompt_logprobs": len(request.prompt) - 1}
        tokens: Any = [*of["generated_tokens"].values()]
        assert tokenizer.decode(tokens) == of["generated_text"][1]


def change(metrics: Metrics, name: str, **values: Any) -> Metrics:
    return metrics | {name: replace(metrics[name], **values)}


@given(data=st.data())
def test_nothing_is_forgiven(data: st.DataObject) -> None:
    """One value of one request other, missing, too much or NaN: its name is told."""
    name = data.draw(st.sampled_from(sorted(GOLDEN.metrics)))
    metric = GOLDEN.metrics[name]
    step = data.draw(st.integers(1, metric.end_step))
    values = dict(metric.values)
    how = data.draw(st.sampled_from(["other", "truncated", "longer", "nan", "request missing"]))
    old = values[step]
    if how == "other":
        values[step] = (
            old[1:] + "x"
            if isinstance(old, str) and name.endswith("text")
            else f"{int(old, 16) ^ 1:016x}"
            if isinstance(old, str)
            else old + 1
            if isinstance(old, int)
            else old * (1 + 2**-52)
        )
    elif how == "truncated":
        values = {s: v for s, v in values.items() if s < step}
    elif how == "longer":
        values[metric.end_step + 1] = old
    elif how == "nan":
        values[step] = float("nan")
    actual = change(GOLDEN.metrics, name, values=values)
    if how == "request missing":
        request = name[: len("request 00")]
        actual = {n: m for n, m in GOLDEN.metrics.items() if not n.startswith(request)}
    comparison = compare_strict(GOLDEN.metrics, actual)
    assert not comparison.passed
    told = " ".join(map(str, comparison.differences))
    assert (name if how != "request missing" else name[: len("request 00")]) in told
    assert not compare_strict(actual, GOLDEN.metrics).passed  # an extra request, too


def test_text_is_text_in_a_golden(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    text = {"a generated_text": Metric(1, 1, 1, {1: "Ünder\n\x00 'quotes' nan"})}
    write_golden(path, "ci", replace(GOLDEN, metrics=text))
    assert read_golden(path, "ci").metrics == text
    wrong: list[tuple[str, Any]] = [("a text", "words"), ("a generated_text", 3)]
    for name, value in wrong:
        bad = replace(GOLDEN, metrics={name: Metric(1, 1, 1, {1: value})})
        with pytest.raises(ValueError, match="cannot be a golden"):
            write_golden(path, "ci", bad)


@pytest.mark.parametrize(
    ("actual", "told"),
    [
        ((80.0, 85.0, 89.0), "slower than"),
        ((80.0, 85.0, 91.0), "within the noise of"),
        ((100.0, 110.0, 120.0), "within the noise of"),
        ((132.0, 200.0, 131.0), "within the noise of"),
        ((133.0, 200.0, 134.0), "faster than"),
    ],
)
def test_throughput_is_compared_by_whole_ranges(actual: tuple[float, ...], told: str) -> None:
    assert compare_rounds((100.0, 110.0, 120.0), actual) == told


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_tokens_give_their_text_back(text: str) -> None:
    assert S3.inference is not None
    for name in ("bytes", f"{S3.inference.model_folder}/tokenizer.json"):
        tokenizer = load_tokenizer(name)
        (tokens,) = tokenizer.encode([text])
        assert tokenizer.decode(tokens) == text
        assert tokenizer.decode([*tokens, tokenizer.vocab_size + 7]) == text


def test_bench_decode(testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "NEW_TOKENS", 3)
    code, out, _ = testbed("bench", "decode", "-n", "1", "--json")
    rows = json.loads(out)["decode"]
    assert (code, [row["batch"] for row in rows], rows[0]["factor"]) == (0, [1, 8, 32, 64], 1.0)
    for row in rows:
        assert row["tokens_s"] == pytest.approx(1000 * row["batch"] / row["step_ms"])
    assert "# decode: S3's model" in testbed("bench", "decode", "-n", "1")[1]


def completions(num: int) -> tuple[list[Request], list[Completion]]:
    sampling = Sampling(max_new_tokens=2, prompt_log_probs=True)
    requests = [Request(id=f"r{i}", prompt=(1, 2, 3), sampling=sampling) for i in range(num)]
    done = [
        Completion(
            r.id, [5, 6], [-0.5, -1.0], [-2.0, -3.0], ["00", "11"], "length", i % 2, False, 1.0, []
        )
        for i, r in enumerate(requests)
    ]
    return requests, done


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"tokens": [5]}, r"r2: got \[1, 2, 2\] values, expected 2 of each"),
        ({"digests": []}, r"r2: got \[2, 2, 0\]"),
        ({"log_probs": [-1.0, float("nan")]}, "r2: a logprob is not finite"),
        ({"prompt_log_probs": [float("-inf"), 0.0]}, "r2: a logprob is not finite"),
        ({"prompt_log_probs": []}, "r2: got 0 prompt logprobs, expected 2"),
        ({"reason": "stop"}, "r2: got"),
        ({"id": "r1"}, "r2: missing, extra or twice"),
        ({"id": "r9"}, "r2, r9: missing, extra or twice"),
    ],
)
def test_checks_catch(fault: dict[str, Any], told: str) -> None:
    requests, done = completions(4)
    assert check_completions(requests, done).passed
    done[2] = replace(done[2], **fault)
    check = check_completions(requests, done)
    assert not check.passed
    assert re.search(told, check.detail)


def test_idle_replicas_and_missing_requests_are_caught() -> None:
    requests, done = completions(8)
    assert check_replicas(done, 2).passed
    assert not check_replicas([replace(c, replica=0) for c in done], 2).passed
    assert not check_completions(requests, done[:-1]).passed
    assert not check_completions(requests[:-1], done).passed
    tokenizer = load_tokenizer("bytes")
    metrics = metrics_of_completions(done, tokenizer)
    assert metrics["r3 logits"].values == {1: "00", 2: "11"}
    assert metrics["r3 generated_text"].values == {1: "\x05\x06"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "S3", "--layout", "tp3"], "tp and etp must divide"),
        (["run", "S3", "--layout", "dp2,zero1"], "tp, pp, dp and sp only"),
        (["run", "S3", "--arithmetic", "native"], "canonical arithmetic"),
        (["run", "S3", "--steps", "2"], "S3 trains nothing"),
        (["run", "S3", "--layouts", "tp1", "--steps", "2"], "S3 trains nothing"),
        (["run", "S3", "--data", "x"], "expected none for inference"),
        (["run", "S3", "--scale", "full"], "no golden recorded for scale full"),
        (["serve", "--checkpoint", "nothing"], "expected the folder of a frozen model"),
        (["serve", "--layout", "tp2,ep2"], "tp, pp, dp and sp only"),
        (["serve", "--kv-budget-mb", "0.001"], "expected at least the"),
        (["generate", "--prompt", ""], "prompt"),
        (["generate", "--prompt", "x", "--stop", ""], "stop_strings.0: got ''"),
        (["freeze", "nothing", "-o", "x"], "expected the folder of a testbed run"),
    ],
)
def test_refuses(
    testbed: Testbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = testbed(*arguments)
    assert code == 2
    assert err.startswith("testbed: error: ")
    assert message in err


def test_serve_and_generate(testbed: Testbed, tmp_path: Path) -> None:
    """The same text from a service of its own and from one that runs, until Ctrl-C."""
    prompt = "Now is the winter of"
    told = ("generate", "--prompt", prompt, "--max-new-tokens", "8", "--json")
    drawn = ("--temperature", "1.5", "--seed", "3")
    code, out, err = testbed(*told, *drawn)
    assert code == 0, err
    alone = json.loads(out)
    command = [sys.executable, "-m", "scenarios", "serve", "--layout", "tp2", "--out", "logs"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[0]
            code, out, err = testbed(*told, *drawn, "--address", address)
            assert code == 0, err
            for name in ("text", "tokens", "log_probs", "digests"):
                assert json.loads(out)[name] == alone[name]
            assert testbed(*told[:-1], "--address", address)[1].startswith(prompt)
            stop = alone["text"][3:6]
            code, out, err = testbed(*told, *drawn, "--address", address, "--stop", stop)
            stopped = json.loads(out)
            assert (stopped["reason"], alone["reason"]) == ("stop", "length")
            num = len(stopped["tokens"])
            for name in ("tokens", "log_probs", "digests"):
                assert stopped[name] == alone[name][:num]
            assert alone["text"].startswith(stopped["text"])
            assert stop in stopped["text"]
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0
        finally:
            process.kill()
    code, _, err = testbed(*told, "--address", address)
    assert code == 3
    assert "has gone or was never there" in err
