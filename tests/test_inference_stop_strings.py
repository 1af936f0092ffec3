"""Stop strings: the shortest prefix whose text contains one, whatever the tokens are made of."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarios.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from scenarios.inference import stop_strings
from scenarios.inference.engine import Engine
from scenarios.inference.model_files import FrozenModel
from scenarios.inference.request import Request, Sampling
from scenarios.inference.stop_strings import ROOM, UNREADABLE, StopStrings
from scenarios.inference_config import EngineConfig
from scenarios.layout import Layout
from scenarios.parallel.mesh import Mesh
from scenarios.schema import load_scenario
from tests.inference_cases import (
    SMALL,
    PieceTokenizer,
    Results,
    make_engine,
    run_all,
    small_model,
)


def written(folder: Path, model: dict[str, Any], decoder: dict[str, Any]) -> Tokenizer:
    """A tokenizer.json of these parts."""
    path = folder / "tokenizer.json"
    content = {"version": "1.0", "added_tokens": [], "model": model, "decoder": decoder}
    path.write_text(json.dumps(content))
    return FileTokenizer(path)


def sentencepiece(folder: Path) -> Tokenizer:
    """Spaces before words, the first of which decoding drops, and bytes for rare characters."""
    words = ["<unk>", "▁", "▁a", "▁bc", "a", "bc", "é", *(f"<0x{b:02X}>" for b in "漢😀é".encode())]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return written(folder, model, {"type": "Sequence", "decoders": decoders})


def shipped() -> Tokenizer:
    """The byte-level BPE of scenario S3."""
    inference = load_scenario("S3", scale="ci").inference
    assert inference is not None
    assert inference.model_folder is not None
    return FileTokenizer(inference.model_folder / "tokenizer.json")


TOKENIZERS: dict[str, Callable[[Path], Tokenizer]] = {
    "pieces": lambda folder: PieceTokenizer(),
    "bytes": lambda folder: ByteTokenizer(),
    "byte-level BPE": lambda folder: shipped(),
    "sentencepiece": sentencepiece,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return TOKENIZERS[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    return small_model(tmp_path_factory.mktemp("model"))


def first_end(tokenizer: Tokenizer, strings: Sequence[str], tokens: list[int]) -> int | None:
    """The definition: how many tokens the shortest prefix has whose text contains a string."""
    for num in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:num])
        if any(string in text for string in strings):
            return num
    return None


def cut_out(data: st.DataObject, text: str, max_size: int) -> str:
    """A piece of a text that can be read; of one that has none, a letter."""
    readable = [run for run in text.split(UNREADABLE) if run] or ["q"]
    run = data.draw(st.sampled_from(readable))
    start = data.draw(st.integers(0, len(run) - 1))
    return run[start : start + data.draw(st.integers(1, max_size))]


@given(data=st.data())
def test_the_tail_decides_as_the_whole_text_does(tokenizer: Tokenizer, data: st.DataObject) -> None:
    few = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12))
    readable = tokenizer.encode(["a bc a é漢😀"])[0]
    rng = data.draw(st.randoms(use_true_random=False))
    num = data.draw(st.integers(1, 300))
    tokens = [token for _ in range(num) for token in rng.choice([[rng.choice(few)], readable])][
        :400
    ]
    late = tokenizer.decode(tokens[data.draw(st.integers(0, len(tokens) - 1)) :])
    longest = data.draw(st.sampled_from([1, 3, 12]))
    strings = [cut_out(data, late, longest) for _ in range(data.draw(st.integers(1, 3)))]
    stops = StopStrings(tokenizer, strings)
    room = data.draw(st.sampled_from([-1000, ROOM]))  # below zero: cut at every token if possible
    with mock.patch.object(stop_strings, "ROOM", room):
        got = next((num for num, token in enumerate(tokens, 1) if stops.ended_by(token)), None)
    assert got == first_end(tokenizer, strings, tokens)


def test_only_the_tail_is_decoded(tokenizer: Tokenizer) -> None:
    (tokens,) = tokenizer.encode(["a bc a é bc a 漢bc 😀 " * 100])
    stops = StopStrings(tokenizer, ["not there", "漢漢"])
    for token in tokens:
        assert not stops.ended_by(token)
        assert len(tokenizer.decode(stops.tail)) < 2 * (9 + ROOM)


def test_a_cut_makes_no_text(tmp_path: Path) -> None:
    """Word pieces, whose ## decoding leaves in front: a tail that begins so is not taken."""
    vocabulary = {"[UNK]": 0, "a": 1, "##a": 2}
    model = {"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]"}
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    tokenizer = written(tmp_path, model, decoder)
    assert (tokenizer.decode([1, 2]), tokenizer.decode([2])) == ("aa", "##a")
    stops = StopStrings(tokenizer, ["##"])
    assert not any(stops.ended_by(token) for token in [1] + [2] * 2 * ROOM)


@settings(max_examples=15)
@given(data=st.data())
def test_a_stopped_answer_is_a_prefix(model: FrozenModel, data: st.DataObject) -> None:
    """Preempted, suspended or cut into chunks: tokens, log-probabilities and digests stay."""
    tokenizer = PieceTokenizer()
    prompts = data.draw(
        st.lists(st.lists(st.integers(0, 95), min_size=1, max_size=24), min_size=1, max_size=4)
    )
    seed = data.draw(st.integers(0, 99))
    sampling = Sampling(max_new_tokens=30, temperature=1.0, seed=seed, prompt_log_probs=True)
    free = [
        Request(id=f"r{number}", prompt=tuple(prompt), sampling=sampling)
        for number, prompt in enumerate(prompts)
    ]
    whole = run_all(make_engine(model), free)
    stopped, lengths = [], {}
    for request in free:
        tokens = whole.tokens[request.id]
        strings = (cut_out(data, tokenizer.decode(tokens), 6),)
        how = sampling.model_copy(update={"stop_strings": strings})
        stopped.append(request.model_copy(update={"sampling": how}))
        lengths[request.id] = first_end(tokenizer, strings, tokens)
    config = EngineConfig(
        block_size=4,
        kv_budget_nbytes=2 * 4 * 64 * 2 * 4 * data.draw(st.integers(14, 30), label="blocks"),
        max_batch_tokens=data.draw(st.integers(4, 40), label="max_batch_tokens"),
        max_running=4,
    )
    suspended = data.draw(st.sets(st.integers(1, 30), max_size=3), label="suspended after")
    engine, results = make_engine(model, config), Results()
    for request in stopped:
        engine.submit(request)
    while steps := engine.step():
        results.add(steps)
        if engine.num_steps in suspended:
            engine.suspend()
    assert engine.blocks_in_use == engine.num_requests == 0
    got, expected = results.as_json(), whole.as_json()
    for name, num in lengths.items():
        assert got["reasons"][name] == ("length" if num is None else "stop")
        assert got["prompts"][name] == expected["prompts"][name]
        for kind in ("tokens", "log_probs", "digests"):
            assert got[kind][name] == expected[kind][name][:num]


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        (("",), r"stop_strings\.0: got ''.* at least 1 character"),
        (("x" * 257,), r"stop_strings\.0: got 'x.* at most 256 characters"),
        (("x",) * 17, "stop_strings: got .* at most 16 items"),
        (("a\ufffd",), r"stop_strings: got 'a\ufffd', expected no U\+FFFD"),
        (("\ud800",), r"stop_strings\.0: got "),
        ("text", r"stop_strings: got 'text'.* valid tuple"),
    ],
)
def test_refuses(strings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling.build(stop_strings=strings)


def test_needs_a_tokenizer(model: FrozenModel) -> None:
    mesh = Mesh(Layout(), 0, {})
    engine = Engine(model.config, model.load(mesh), mesh, SMALL)
    request = Request(id="x", prompt=(1,), sampling=Sampling(stop_strings=("a",)))
    with pytest.raises(ValueError, match=r"'x': got stop_strings \('a',\), expected none"):
        engine.submit(request)
    assert engine.num_requests == 0
