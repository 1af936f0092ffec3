"""The inference engine of one rank: requests in, tokens out, a step at a time.

The ranks of a replica (tp and pp) run in lockstep: each has the whole schedule and makes the same
plan; activations go from stage to stage, and the last stage tells all what was chosen.
"""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from primitives.arithmetic import kernels
from scenarios.data.tokenizer import Tokenizer
from scenarios.inference.forward import StepBatch, head_logits, run_stage
from scenarios.inference.kv_cache import BlockManager, KvCache
from scenarios.inference.request import Request, check_request
from scenarios.inference.sampling import choose
from scenarios.inference.scheduler import Scheduler, Segment
from scenarios.inference.stop_strings import StopStrings
from scenarios.inference_config import EngineConfig
from scenarios.models.families import DTYPES
from scenarios.models.gpt import Gpt
from scenarios.parallel.mesh import Mesh
from scenarios.scenario import ModelConfig

DIGEST_NBYTES = 8
Reason = Literal["length", "stop", "not finite"]


@dataclass(frozen=True)
class Progress:
    """What one step did for one request."""

    key: str
    prompt_log_probs: list[float] = field(default_factory=list)
    """Of prompt tokens, in order, from the second token of the prompt on; continues the last."""
    token: int | None = None
    """The new one; None while the prompt is being prefilled."""
    log_prob: float = 0.0
    """Of the new token, by the model's own distribution whatever temperature, top-k and top-p."""
    digest: str = ""
    """SHA-256, 16 hex digits, of the logits that the new token was chosen by."""
    finished: Reason | None = None


class Engine:
    """One rank's engine.

    Args:
        model_config: sizes and precision.
        model: this rank's stage, with its weights.
        mesh: of a replica: tp and pp, no dp.
        config: budget and limits.
        tokenizer: the model's; without one, requests with stop strings are refused.

    Raises:
        ValueError: a model that is not a dense GPT, or a budget below one block.

    Contract: every rank of the replica makes the same calls in the same order; ``step`` is
    collective.
    Numerics: tokens, log-probabilities and digests do not depend on layout, on the other requests,
    on their order, chunks, preemption or suspension; log-probabilities are those of the training
    forward of the same text without dropout ([Note: same bits as training]).
    """

    def __init__(
        self,
        model_config: ModelConfig,
        model: Gpt,
        mesh: Mesh,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
    ):
        if model_config.moe is not None:
            raise ValueError("inference: got a model with experts, expected a dense GPT")
        if mesh.layout.dp != 1:
            raise ValueError(f"inference: got layout {mesh.layout}, expected one replica (dp 1)")
        self.model_config, self.config = model_config, config
        self._model, self._mesh, self._tokenizer = model.eval(), mesh, tokenizer
        self._blocks = BlockManager(config.num_blocks(model_config), config.block_size)
        self._scheduler = Scheduler(config, self._blocks)
        self._cache: KvCache | None = None
        self.num_steps = 0

    @property
    def blocks_in_use(self) -> int:
        """Blocks of the KV cache that requests own."""
        return self._blocks.num_in_use

    @property
    def num_blocks(self) -> int:
        """Blocks of the budget."""
        return self._blocks.num_blocks

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._scheduler.waiting) + len(self._scheduler.running)

    def submit(self, request: Request, key: str | None = None) -> None:
        """Queues a request.

        Args:
            request: what to generate; its id keys the draws.
            key: names its progress; default: the id.

        Raises:
            ValueError: it can never be generated, or its key is in use.
        """
        key = request.id if key is None else key
        has_tokenizer = self._tokenizer is not None
        check_request(request, self.model_config, self.config, has_tokenizer=has_tokenizer)
        if self._scheduler.find(key) is not None:
            raise ValueError(f"request {request.id!r}: key {key!r} is in use")
        stops = None
        if self._tokenizer is not None and request.sampling.stop_strings:
            stops = StopStrings(self._tokenizer, request.sampling.stop_strings)
        self._scheduler.add(request, key, stops)

    def abort(self, key: str) -> bool:
        """Forgets a request; False if there is none of this key (any more)."""
        sequence = self._scheduler.find(key)
        if sequence is not None:
            self._scheduler.remove(sequence)
        return sequence is not None

    def suspend(self) -> None:
        """Gives the KV cache's memory back; the next step recomputes what was running."""
        self._scheduler.preempt_all()
        self._cache = None

    @torch.no_grad()
    def step(self) -> list[Progress]:
        """Runs one step.

        Returns:
            What it did, the same on every rank; empty if there was nothing to do.
        """
        segments = self._scheduler.plan()
        if not segments:
            return []
        if self._cache is None:
            self._cache = self._make_cache()
        batch = StepBatch(segments, self._blocks, self._mesh, self._cache.empty_slot)
        stage, pp = self._mesh.stage, self._mesh.pp
        x = None
        if not stage.is_first:
            local = batch.microbatch.local_slice
            x = torch.empty(
                local.stop - local.start,
                self.model_config.hidden_size,
                dtype=DTYPES[self.model_config.precision],
            )
            dist.recv(x, src=pp.ranks[stage.index - 1], group=pp.handle)
        x = run_stage(self._model, x, batch, self._cache)
        if not stage.is_last:
            dist.send(x.contiguous(), dst=pp.ranks[stage.index + 1], group=pp.handle)
        outcome = self._outcome(segments, batch, x)
        self.num_steps += 1
        return self._apply(segments, outcome)

    def _make_cache(self) -> KvCache:
        model = self.model_config
        num_layers = len(self._mesh.stage.layers(model.num_layers))
        num_heads = model.num_attention_heads // self._mesh.tp.num_ranks
        head_dim = model.hidden_size // model.num_attention_heads
        num_slots = self._blocks.num_blocks * self._blocks.block_size
        return KvCache(num_layers, num_heads, num_slots, head_dim, DTYPES[model.precision])

    def _outcome(self, segments: list[Segment], batch: StepBatch, x: Tensor) -> "_Outcome":
        """What the last stage found, on all ranks."""
        rows: list[int] = []
        targets: list[int] = []  # -1: to be chosen
        for segment, first_row in zip(segments, batch.first_rows, strict=True):
            for position in segment.scored:
                rows.append(first_row + position - 1 - segment.start)
                targets.append(segment.sequence.tokens[position])
            if segment.samples:
                rows.append(first_row + segment.stop - 1 - segment.start)
                targets.append(-1)
        if not rows:
            return _Outcome.empty(0)
        if self._mesh.stage.is_last:
            logits = head_logits(self._model, x, torch.tensor(rows), batch.microbatch)
            outcome = self._choose(segments, logits, targets)
        else:
            outcome = _Outcome.empty(len(rows))
        world, layout = self._mesh.world, self._mesh.layout
        if world.handle is not None:
            source = world.ranks[(layout.pp - 1) * layout.tp]
            dist.broadcast(outcome.packed, src=source, group=world.handle)
        return outcome

    def _choose(self, segments: list[Segment], logits: Tensor, targets: list[int]) -> "_Outcome":
        outcome = _Outcome.empty(len(targets))
        by_row = logits.transpose(0, 1).reshape(len(targets), -1)  # [rows, V]
        values = by_row.float()
        finite = values.isfinite().all(dim=1).tolist()
        sampling = iter([segment.sequence for segment in segments if segment.samples])
        tokens, digests = list(targets), bytearray()
        for row, target in enumerate(targets):
            digest = bytes(DIGEST_NBYTES)
            if target < 0:
                sequence = next(sampling)
                request = sequence.request
                digest = hashlib.sha256(by_row[row].view(torch.uint8).numpy().tobytes()).digest()
                tokens[row] = 0
                if finite[row]:
                    position = len(sequence.tokens)
                    tokens[row] = choose(values[row], request.sampling, request.id, position)
            digests += digest[:DIGEST_NBYTES]
        outcome.tokens.copy_(torch.tensor(tokens))
        loss, _, _ = kernels.cross_entropy(logits, outcome.tokens)
        outcome.log_probs.copy_(-loss)
        outcome.digests.copy_(torch.frombuffer(digests, dtype=torch.uint8).view(-1, DIGEST_NBYTES))
        return outcome

    def _apply(self, segments: list[Segment], outcome: "_Outcome") -> list[Progress]:
        done: list[Progress] = []
        rows = iter(
            zip(
                outcome.tokens.tolist(),
                outcome.log_probs.tolist(),
                outcome.digests.numpy(),
                strict=True,
            )
        )
        for segment in segments:
            sequence, request = segment.sequence, segment.sequence.request
            scored = [next(rows)[1] for _ in segment.scored]
            sequence.num_scored += len(scored)
            sequence.num_cached = segment.stop
            if not segment.samples:
                finished = None if all(map(math.isfinite, scored)) else _NOT_FINITE
                done.append(Progress(sequence.key, scored, finished=finished))
            else:
                token, log_prob, digest = next(rows)
                sequence.tokens.append(token)
                finished = None
                if not all(map(math.isfinite, [log_prob, *scored])):
                    finished = _NOT_FINITE
                elif sequence.ended_by(token):
                    finished = "stop"
                elif len(sequence.tokens) == request.max_tokens:
                    finished = "length"
                text = digest.tobytes().hex()
                done.append(Progress(sequence.key, scored, token, log_prob, text, finished))
            if finished:
                self._scheduler.remove(sequence)
        return done


_NOT_FINITE: Reason = "not finite"


@dataclass(frozen=True)
class _Outcome:
    """One row for each token whose log-probability a step found, views of one buffer."""

    packed: Tensor
    """[rows * 20] uint8"""
    tokens: Tensor
    """[rows] int64"""
    log_probs: Tensor
    """[rows] fp32"""
    digests: Tensor
    """[rows, 8] uint8; zeros for tokens of a prompt"""

    @classmethod
    def empty(cls, num_rows: int) -> "_Outcome":
        packed = torch.zeros(num_rows * (12 + DIGEST_NBYTES), dtype=torch.uint8)
        return cls(
            packed,
            packed[: 8 * num_rows].view(torch.int64),
            packed[8 * num_rows : 12 * num_rows].view(torch.float32),
            packed[12 * num_rows :].view(num_rows, DIGEST_NBYTES),
        )
