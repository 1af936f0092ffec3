"""Continuous batching: which tokens of which requests go through the model in the next step.

Every rank of a replica runs its own scheduler on the same events, and so makes the same plan.
"""

from collections import deque
from dataclasses import dataclass, field

from scenarios.inference.kv_cache import BlockManager
from scenarios.inference.request import Request
from scenarios.inference.stop_strings import StopStrings
from scenarios.inference_config import EngineConfig


@dataclass(eq=False)
class Sequence:
    """A request on its way."""

    key: str
    """Whose progress it is; unlike the request's id unique over all clients."""
    request: Request
    tokens: list[int]
    """Of the prompt, then generated ones."""
    stop_strings: StopStrings | None = None
    """Has seen the generated ones; None if the request names none."""
    num_cached: int = 0
    """How many of them have keys and values in the cache."""
    blocks: list[int] = field(default_factory=list)
    num_scored: int = 1
    """Prompt tokens whose log-probability is known or cannot be: the first follows nothing."""

    @property
    def num_generated(self) -> int:
        """Tokens behind the prompt."""
        return len(self.tokens) - len(self.request.prompt)

    def ended_by(self, token: int) -> bool:
        """Whether a new token is, or completes, what the request stops at; asked once of each."""
        if token in self.request.sampling.stop_tokens:
            return True
        return self.stop_strings is not None and self.stop_strings.ended_by(token)


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence in a step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether a new token follows."""
        return self.stop == len(self.sequence.tokens)

    @property
    def scored(self) -> range:
        """The positions whose tokens' log-probabilities the logits of this segment give."""
        sequence = self.sequence
        if not sequence.request.sampling.prompt_log_probs:
            return range(0)
        first = max(self.start + 1, sequence.num_scored)
        return range(first, min(self.stop + 1, len(sequence.request.prompt)))


class Scheduler:
    """The waiting and the running requests of one replica.

    Args:
        config: limits of a step.
        blocks: of the KV cache.

    Running requests decode one token a step; what is left of the step's tokens prefills, in order
    of arrival, in chunks. When blocks run out, the request that came last gives its own back,
    waits, and is recomputed later: the same bits, since they do not depend on chunks. The oldest
    request always advances, so every request ends.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager):
        self._config = config
        self._blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, request: Request, key: str, stop_strings: StopStrings | None = None) -> None:
        """Queues a request under a key that no other one has."""
        self.waiting.append(Sequence(key, request, list(request.prompt), stop_strings))

    def find(self, key: str) -> Sequence | None:
        """The waiting or running sequence of a key."""
        return next((s for s in [*self.running, *self.waiting] if s.key == key), None)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a request and frees its blocks."""
        self._blocks.free(sequence.blocks)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def preempt_all(self) -> None:
        """Has every running request start anew, with the tokens that it has."""
        while self.running:
            self._preempt_last()

    def plan(self) -> list[Segment]:
        """The next step; empty if there is nothing to do. Blocks for it are owned then."""
        budget = self._config.max_batch_tokens
        segments: dict[int, Segment] = {}  # by id of the sequence
        decoding = [s for s in self.running if len(s.tokens) - s.num_cached == 1]
        prefilling = [s for s in self.running if s not in decoding]
        for sequence in [*decoding, *prefilling]:
            count = min(budget, len(sequence.tokens) - sequence.num_cached)
            if count and self._make_room(sequence, sequence.num_cached + count):
                segments[id(sequence)] = self._segment(sequence, count)
                budget -= count
        while budget and self.waiting and len(self.running) < self._config.max_running:
            sequence = self.waiting[0]
            if not self._blocks.can_grow(sequence.blocks, len(sequence.tokens)):
                break
            self.running.append(self.waiting.popleft())
            count = min(budget, len(sequence.tokens))
            self._blocks.grow(sequence.blocks, count)
            segments[id(sequence)] = self._segment(sequence, count)
            budget -= count
        # Whoever was preempted after its segment was planned is not running any more.
        return [segments[id(s)] for s in self.running if id(s) in segments]

    def _segment(self, sequence: Sequence, count: int) -> Segment:
        return Segment(sequence, sequence.num_cached, sequence.num_cached + count)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the first tokens of a sequence; False if it was preempted for older ones."""
        while sequence in self.running:
            if self._blocks.can_grow(sequence.blocks, num_tokens):
                self._blocks.grow(sequence.blocks, num_tokens)
                return True
            self._preempt_last()
        return False

    def _preempt_last(self) -> None:
        sequence = self.running.pop()
        self._blocks.free(sequence.blocks)
        sequence.num_cached = 0
        self.waiting.appendleft(sequence)
