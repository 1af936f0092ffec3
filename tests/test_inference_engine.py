"""One engine: the training forward's bits, whatever else runs and however it is scheduled."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarios.inference.engine import Engine
from scenarios.inference.kv_cache import BlockManager
from scenarios.inference.model_files import FrozenModel, read_model
from scenarios.inference.request import Request, Sampling
from scenarios.inference.sampling import choose
from scenarios.inference_config import EngineConfig
from scenarios.layout import Layout
from scenarios.parallel.mesh import Mesh
from tests.inference_cases import (
    SMALL,
    Results,
    make_engine,
    run_all,
    small_model,
    small_requests,
    training_forward,
)

NUM_REQUESTS = 10
BLOCK_NBYTES = 2 * 4 * 64 * 2 * 4
"""Of a block of four tokens of the small model in fp16."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: FrozenModel) -> dict[str, dict[str, Any]]:
    """What each request gives when nobody else is there and its prompt is prefilled at once."""
    config = SMALL.model_copy(update={"max_batch_tokens": 64})
    return {
        request.id: run_all(make_engine(model, config), [request]).as_json()
        for request in small_requests(NUM_REQUESTS)
    }


def of_request(results: Results, request_id: str) -> dict[str, Any]:
    return {name: {request_id: by[request_id]} for name, by in results.as_json().items()}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_equals_the_training_forward(tmp_path: Path, precision: str) -> None:
    model = small_model(tmp_path, precision)
    requests = small_requests(6)
    results = run_all(make_engine(model), requests)
    for request in requests:
        tokens = [*request.prompt, *results.tokens[request.id]]
        expected, logits = training_forward(model, tokens)
        got = results.prompt_log_probs[request.id] + results.log_probs[request.id]
        assert [value.hex() for value in got] == [value.hex() for value in expected]
        for place, digest in enumerate(results.digests[request.id]):
            row = logits[len(request.prompt) - 1 + place]
            content = row.view(torch.uint8).numpy()
            assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_notices_one_other_weight(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    requests = small_requests(2)
    right = run_all(make_engine(model), requests)
    mesh = Mesh(Layout(), 0, {})
    stage = model.load(mesh)
    weight: Any = stage.layers[3].mlp.linear_fc2.weight  # type: ignore[union-attr]
    weight.data[0, 0] *= 1.01  # one row of one part, [h, ffn / C]
    wrong = run_all(Engine(model.config, stage, mesh, SMALL), requests)
    assert wrong.digests != right.digests


@settings(max_examples=25)
@given(data=st.data())
def test_composition_order_chunks_and_preemption_change_nothing(
    model: FrozenModel, alone: dict[str, dict[str, Any]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(NUM_REQUESTS)), label="arrival")
    chosen = order[: data.draw(st.integers(1, NUM_REQUESTS), label="requests")]
    max_running = data.draw(st.integers(1, 8), label="max_running")
    config = EngineConfig(
        block_size=4,
        # From what one request needs up: 8 blocks hold the longest of 31 tokens.
        kv_budget_nbytes=BLOCK_NBYTES * data.draw(st.integers(8, 40), label="blocks"),
        max_batch_tokens=data.draw(st.integers(max_running, 40), label="max_batch_tokens"),
        max_running=max_running,
    )
    gaps = data.draw(st.lists(st.integers(0, 4), min_size=len(chosen), max_size=len(chosen)))
    suspended = data.draw(st.sets(st.integers(1, 30), max_size=3), label="suspended after")
    engine, results = make_engine(model, config), Results()
    requests = small_requests(NUM_REQUESTS)
    for number, gap in zip(chosen, gaps, strict=True):
        engine.submit(requests[number])
        for _ in range(gap):
            results.add(engine.step())
    while steps := engine.step():
        results.add(steps)
        assert engine.blocks_in_use <= engine.num_blocks
        if engine.num_steps in suspended:
            engine.suspend()
            assert engine.blocks_in_use == 0
    assert engine.blocks_in_use == engine.num_requests == 0
    for number in chosen:
        assert of_request(results, f"r{number}") == alone[f"r{number}"]
    assert len(results.reasons) == len(chosen)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_size_changes_nothing(
    model: FrozenModel, alone: dict[str, dict[str, Any]], block_size: int
) -> None:
    config = SMALL.model_copy(update={"block_size": block_size})
    results = run_all(make_engine(model, config), small_requests(NUM_REQUESTS))
    for request_id, expected in alone.items():
        assert of_request(results, request_id) == expected


def test_abort_frees_and_disturbs_nobody(
    model: FrozenModel, alone: dict[str, dict[str, Any]]
) -> None:
    engine, results = make_engine(model), Results()
    for request in small_requests(NUM_REQUESTS):
        engine.submit(request)
    results.add(engine.step())
    assert engine.abort("r4")
    assert engine.abort("r9")
    assert not engine.abort("r4")
    while steps := engine.step():
        results.add(steps)
    assert engine.blocks_in_use == 0
    for request_id in ("r0", "r1", "r5", "r8"):
        assert of_request(results, request_id) == alone[request_id]
    assert not {"r4", "r9"} & set(results.reasons)


def test_stop_tokens(model: FrozenModel, alone: dict[str, dict[str, Any]]) -> None:
    tokens = alone["r5"]["tokens"]["r5"]
    (request,) = small_requests(6, stop_tokens=(tokens[2],))[5:]
    results = run_all(make_engine(model), [request])
    assert results.tokens["r5"] == tokens[: tokens.index(tokens[2]) + 1]
    assert results.reasons == {"r5": "stop"}


def test_logits_that_are_not_finite_end_their_request_alone(
    model: FrozenModel, alone: dict[str, dict[str, Any]]
) -> None:
    mesh = Mesh(Layout(), 0, {})
    stage = model.load(mesh)
    table: Any = stage.embedding.position_embeddings.weight
    table.data[30] = float("inf")  # only the longest request comes so far
    requests = small_requests(NUM_REQUESTS)
    longest = max(requests, key=lambda request: request.max_tokens)
    assert longest.max_tokens <= 30
    more = longest.sampling.model_copy(update={"max_new_tokens": 35 - len(longest.prompt)})
    poisoned = Request(id="poisoned", prompt=longest.prompt, sampling=more)
    engine = Engine(model.config, stage, mesh, SMALL)
    results = run_all(engine, [poisoned, *requests])
    assert results.reasons["poisoned"] == "not finite"
    for request in requests:
        assert of_request(results, request.id) == alone[request.id]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": (1,) * 60, "sampling": {"max_new_tokens": 5}}, "expected at most 64"),
        ({"prompt": (1, 96)}, "got token 96, expected less than 96"),
        ({"prompt": ()}, "prompt"),
        ({"prompt": (1,), "sampling": {"top_p": 0.0}}, "top_p"),
        ({"prompt": (1,), "sampling": {"temperature": float("nan")}}, "temperature"),
    ],
)
def test_refuses(model: FrozenModel, request_: dict[str, Any], message: str) -> None:
    engine = make_engine(model)
    with pytest.raises(ValueError, match=message):
        engine.submit(Request.build(id="x", **request_))
    assert engine.num_requests == 0


def test_refuses_more_than_the_budget_and_an_id_twice(model: FrozenModel) -> None:
    config = SMALL.model_copy(update={"kv_budget_nbytes": 5 * BLOCK_NBYTES})
    engine = make_engine(model, config)
    request = Request(id="x", prompt=(1,) * 20, sampling=Sampling(max_new_tokens=1))
    with pytest.raises(ValueError, match="expected at most 20, the tokens of the KV budget"):
        engine.submit(request)
    engine.submit(Request(id="x", prompt=(1,)))
    with pytest.raises(ValueError, match="key 'x' is in use"):
        engine.submit(Request(id="x", prompt=(2,)))
    with pytest.raises(ValueError, match="of one block"):
        make_engine(model, SMALL.model_copy(update={"kv_budget_nbytes": 100}))


@given(
    lengths=st.lists(st.integers(0, 40), max_size=8),
    freed=st.lists(st.integers(0, 7), max_size=8),
)
def test_no_block_has_two_owners(lengths: list[int], freed: list[int]) -> None:
    blocks = BlockManager(20, 3)
    owners: list[list[int]] = [[] for _ in lengths]
    for owned, length in zip(owners, lengths, strict=True):
        if blocks.can_grow(owned, length):
            blocks.grow(owned, length)
            assert len(blocks.slots(owned, 0, length)) == len(set(blocks.slots(owned, 0, length)))
    for number in freed:
        if number < len(owners):
            blocks.free(owners[number])
    every = [block for owned in owners for block in owned]
    assert len(every) == len(set(every)) == blocks.num_in_use


def test_a_block_cannot_be_freed_twice() -> None:
    blocks = BlockManager(4, 2)
    owned: list[int] = []
    blocks.grow(owned, 3)
    blocks.free([*owned])
    with pytest.raises(ValueError, match="freed twice"):
        blocks.free(owned)


def test_sampling_is_its_definition() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, -2.0, 2.5])
    assert choose(logits, Sampling(), "a", 0) == 1
    assert choose(logits, Sampling(temperature=2.0, top_k=1), "a", 0) == 1

    def counts(**how: Any) -> list[int]:
        sampling = Sampling(temperature=1.0, **how)
        drawn = [choose(logits, sampling, "a", position) for position in range(4000)]
        return [drawn.count(token) for token in range(5)]

    expected = torch.softmax(logits, 0) * 4000
    for got, mean in zip(counts(), expected.tolist(), strict=True):
        assert abs(got - mean) < 5 * (mean + 1) ** 0.5
    assert [n > 0 for n in counts(top_k=2)] == [False, True, True, False, False]
    assert [n > 0 for n in counts(top_p=0.7)] == [False, True, True, False, False]
    assert [n > 0 for n in counts(top_p=0.74)] == [False, True, True, False, True]
    assert counts(seed=1) != counts(seed=2)


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    small_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: corrupt: got SHA-256"):
        read_model(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="got SHA-256 no file"):
        read_model(tmp_path)
    with pytest.raises(ValueError, match="expected the folder of a frozen model"):
        read_model(tmp_path / "nothing")
