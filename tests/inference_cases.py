"""Small models, requests and runs for the tests of inference."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from primitives import canonical
from scenarios.inference.engine import Engine, Progress
from scenarios.inference.model_files import FrozenModel, read_model, write_model
from scenarios.inference.request import Request, Sampling
from scenarios.inference_config import EngineConfig
from scenarios.layout import Layout
from scenarios.models.families import DTYPES
from scenarios.models.gpt import Gpt
from scenarios.parallel.layers import column_linear
from scenarios.parallel.mesh import Mesh, Stage
from scenarios.parallel.microbatch import Microbatch
from scenarios.scenario import ModelConfig

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 16,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "vocab_size": 96,
    "apply_query_key_layer_scaling": True,
}
SMALL = EngineConfig(block_size=4, kv_budget_nbytes=2**20, max_batch_tokens=24, max_running=8)


class PieceTokenizer:
    """96 tokens: letters, spaces, nothing, and characters of several bytes, whole and broken."""

    name, vocab_size, eod = "pieces", 96, 0
    _LAST = (b"", b" ", b"a", b"b", "é".encode(), *(bytes([b]) for b in "漢😀".encode()))
    _FIRST = (b"", b"a", b"ab", b" ", "é".encode(), "漢".encode(), b"\xbc\xa2", b"\x98\x80")
    PIECES = tuple(first + last for first, last in itertools.product(_FIRST, _LAST))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Byte by byte where there is a piece for it."""
        pieces = ("é", *"ab ")
        return [[self.PIECES.index(c.encode()) for c in t if c in pieces] for t in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the pieces."""
        return b"".join(self.PIECES[i] for i in ids).decode(errors="replace")


def small_model(folder: Path, precision: str = "fp16") -> FrozenModel:
    """A model of random weights, large enough that logits differ well."""
    config = ModelConfig.build(**SIZES, precision=precision)
    dtype = DTYPES[precision]
    weights = {}
    for layer in Gpt(config, dtype, Stage()).parameter_layers():
        for spec in layer.specs:
            noise = canonical.random_normal(spec.shape, len(weights))
            weights[spec.name] = (spec.init_mean + noise * 0.2).to(dtype)
    write_model(folder, config, weights, tokenizer=None, eod=None, provenance={})
    return read_model(folder)


def small_requests(num: int, **sampling: Any) -> list[Request]:
    """Requests of different lengths; every other one draws its tokens."""
    requests = []
    for i in range(num):
        prompt = tuple((7 * i + 11 * j * j + j) % 96 for j in range(1 + 5 * i % 23))
        how = {"max_new_tokens": 3 + i % 6, "seed": i, "prompt_log_probs": True}
        drawn = {"temperature": 0.8, "top_k": (0, 20)[i % 2], "top_p": (1.0, 0.9)[i // 2 % 2]}
        how |= (drawn if i % 2 else {}) | sampling
        requests.append(Request(id=f"r{i}", prompt=prompt, sampling=Sampling.build(**how)))
    return requests


class Results:
    """What an engine gave, by request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.log_probs: dict[str, list[float]] = {}
        self.prompt_log_probs: dict[str, list[float]] = {}
        self.digests: dict[str, list[str]] = {}
        self.reasons: dict[str, str] = {}

    def add(self, steps: Sequence[Progress]) -> None:
        """Takes in one step."""
        for p in steps:
            self.prompt_log_probs.setdefault(p.key, []).extend(p.prompt_log_probs)
            if p.token is not None:
                self.tokens.setdefault(p.key, []).append(p.token)
                self.log_probs.setdefault(p.key, []).append(p.log_prob)
                self.digests.setdefault(p.key, []).append(p.digest)
            if p.finished:
                assert p.key not in self.reasons
                self.reasons[p.key] = p.finished

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Results) and self.as_json() == other.as_json()

    def as_json(self) -> dict[str, Any]:
        """Plain values; floats as text of their bits."""
        return {
            "tokens": self.tokens,
            "log_probs": {k: [v.hex() for v in vs] for k, vs in self.log_probs.items()},
            "prompts": {k: [v.hex() for v in vs] for k, vs in self.prompt_log_probs.items()},
            "digests": self.digests,
            "reasons": self.reasons,
        }


def make_engine(
    model: FrozenModel, config: EngineConfig = SMALL, mesh: Mesh | None = None
) -> Engine:
    """An engine that reads tokens as pieces; without a mesh alone."""
    mesh = mesh or Mesh(Layout(), 0, {})
    return Engine(model.config, model.load(mesh), mesh, config, PieceTokenizer())


def run_all(engine: Engine, requests: Sequence[Request]) -> Results:
    """Submits all at once and runs to the end."""
    results = Results()
    for request in requests:
        engine.submit(request)
    while steps := engine.step():
        results.add(steps)
    assert engine.num_requests == 0
    assert engine.blocks_in_use == 0
    return results


@torch.no_grad()
def training_forward(model: FrozenModel, tokens: Sequence[int]) -> tuple[list[float], torch.Tensor]:
    """Log-probabilities of all tokens but the first, and the logits [tokens, V], as training
    computes them: the text padded to the model's sequence length, no dropout."""
    mesh = Mesh(Layout(), 0, {})
    config = model.config.model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    gpt = Gpt(config, DTYPES[config.precision], Stage())
    gpt.allocate(mesh)
    source = model.load(mesh)
    gpt.load_state_dict(source.state_dict())
    length = config.seq_length
    padded = torch.tensor([[*tokens, *([5] * (length + 1 - len(tokens)))]])
    sink: Any = None
    mb = Microbatch.create(
        0, padded[:, :length], padded[:, 1:], torch.zeros(1, dtype=torch.long), 0, sink, mesh
    )
    losses = gpt(None, mb)
    x = gpt.embedding(mb)
    for layer in gpt.layers:
        x = layer(x, mb.token_ids(), mb)
    logits = column_linear(gpt.final_layernorm(x, mb), gpt.head(), None, "", mb)
    by_token = logits.transpose(0, 1).reshape(length, -1) + 0.0
    values = (-losses[: len(tokens) - 1]).tolist()
    assert all(map(math.isfinite, values))
    return values, by_token
