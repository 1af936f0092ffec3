"""``testbed convert``: output, proof, weights and exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from scenarios import cli
from scenarios.convert.shrink import shrink
from scenarios.convert.source_model import SourceModel
from tests.convert_cases import published


@pytest.fixture
def config_json(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published("qwen3_moe")))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_yaml_json_and_flags(config_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "convert", config_json, "--layout", "pp4,ep8")
    document = yaml.safe_load(out)
    assert code == 0
    assert document["transformer"]["num_moe_experts"] == 128
    assert document["transformer"]["pipeline_model_parallel_size"] == 4
    assert document["gpt_model"]["rotary_base"] == 1000000
    assert "sliding_window" in document["ignored"]
    code, out, _ = run(capsys, "convert", config_json, "--layout", "pp4,ep8", "--json")
    assert code == 0
    assert json.loads(out) == document
    code, out, _ = run(capsys, "convert", config_json, "--format", "flags")
    assert code == 0
    assert "--num-experts 128 --moe-ffn-hidden-size 768" in out


def test_proof_and_its_exit_codes(config_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "convert", config_json, "--prove")
    assert code == 0
    assert "pass  qwen3_moe: logits differ by" in err
    wrong = "moe_router_pre_softmax=true"
    code, out, _ = run(capsys, "convert", config_json, "--prove", "--override", wrong, "--json")
    assert code == 1
    assert json.loads(out)["proof"]["first_difference"] == "layer 0 mlp"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "expected CONFIG_JSON"),
        (("{config}", "--layout", "tp3,sp"), "expected a multiple of 3 for this layout"),
        (("{config}", "--override", "x"), "expected FIELD=VALUE"),
        (("{config}", "--override", "hiden_size=3"), "did you mean 'hidden_size'?"),
        (("{config}", "--weights", "x"), "--weights and -o belong together"),
        (("--to", "hf"), "--to hf takes --weights and -o"),
        (("nothing.json",), "nothing.json: cannot be read"),
    ],
)
def test_usage(
    words: tuple[str, ...], expected: str, config_json: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(config=config_json) for word in words]
    code, _, err = run(capsys, "convert", *given)
    assert code == 2
    assert expected in err


def test_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = shrink(published("llama"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    SourceModel(config).save(tmp_path / "hf")
    words = ("--weights", tmp_path / "hf", "-o", tmp_path / "megatron", "--layout", "tp2")
    assert run(capsys, "convert", tmp_path / "config.json", *words)[0] == 0
    assert (tmp_path / "megatron/tp1_pp0/model.safetensors.index.json").exists()
    words = ("--to", "hf", "--weights", tmp_path / "megatron", "-o", tmp_path / "back")
    code, out, _ = run(capsys, "convert", *words)
    assert code == 0
    assert "llama" in out
    assert (tmp_path / "back/config.json").exists()
