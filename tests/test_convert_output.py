"""What a conversion yields: YAML, JSON, flags, in which time, and what it imports."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scenarios.convert import ParallelLayout, convert
from scenarios.convert.flags import flags, plain, to_yaml, words
from tests.convert_cases import DEFAULT, published

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("model_type", DEFAULT)
def test_output_forms(model_type: str) -> None:
    model = convert(published(model_type))
    document = yaml.safe_load(to_yaml(model))
    assert document == json.loads(json.dumps(plain(model)))
    assert document["transformer"]["num_layers"] == model.transformer.num_layers
    no_flags = {
        "bert": "BERT has no flags",
        "gpt_oss": "yarn has no flags",
        "gemma": "extra modules ScaledEmbedding",
        "qwen3_next": "extra modules PlainRMSNorm",
    }
    for name, reason in no_flags.items():
        if model_type.startswith(name):
            with pytest.raises(ValueError, match=reason):
                flags(model)
            return
    given_words = words(flags(model))
    assert given_words[given_words.index("--num-layers") + 1] == str(model.transformer.num_layers)
    assert all(isinstance(word, str) and word for word in given_words)


def test_the_time_of_a_conversion() -> None:
    """Printed against the limit of 50 ms; a busy machine fails no test."""
    times_ms = []
    for model_type in DEFAULT:
        start = time.perf_counter()
        convert(published(model_type))
        times_ms.append((time.perf_counter() - start) * 1e3)
    print(f"conversion: {min(times_ms):.2f} to {max(times_ms):.2f} ms")
    assert len(times_ms) == len(DEFAULT)


WITHOUT_THEM = """
import sys
sys.modules |= {"megatron": None, "transformers": None}  # an import of either is an error now
from scenarios import cli
assert cli.main(["--help"]) == cli.main(["convert", "--help"]) == 0
for path in sys.argv[1:]:
    print(end="\\0")
    assert cli.main(["convert", path, "--json"]) == 0
sys.exit(cli.main(["convert", sys.argv[1], "--prove"]))
"""


def test_without_megatron_core_and_transformers(tmp_path: Path) -> None:
    """Neither help nor a conversion imports them; the output is the same; a proof asks for them."""
    files = [tmp_path / f"{model_type}.json" for model_type in DEFAULT]
    for file in files:
        file.write_text(json.dumps(published(file.stem)))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THEM, *files], capture_output=True, text=True, cwd=ROOT
    )
    for file, document in zip(files, done.stdout.split("\0")[1:], strict=True):
        assert json.loads(document) == json.loads(json.dumps(plain(convert(file))))
    assert done.returncode == 2
    assert "--prove needs transformers: pip install" in done.stderr


def test_the_output_names_the_modules_that_bert_needs_besides() -> None:
    document = plain(convert(published("bert")))
    assert "gpt_model" not in document
    assert document["bert_model"]["num_tokentypes"] == 2
    assert document["bert_model"]["add_binary_head"]
    names = [module["module"].rpartition(".")[2] for module in document["extra_modules"]]
    assert names == ["SumThenNorm", "NormThenDropout"]
    with pytest.raises(ValueError, match="BertModel counts positions from 0 on every rank"):
        convert(published("bert"), layout=ParallelLayout(cp=2))
    with pytest.raises(ValueError, match="binary_head: got true without pooler"):
        convert(published("bert"), overrides={"pooler": False})
