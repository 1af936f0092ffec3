"""The requests of an inference scenario, and what came of them as metrics, checks and figures."""

import math
from collections.abc import Sequence

from scenarios.compare import compare_strict
from scenarios.data.tokenizer import Tokenizer
from scenarios.golden import Metric, Metrics, Value
from scenarios.inference.client import Completion
from scenarios.inference.request import Request, Sampling
from scenarios.inference_config import INFERENCE_METRICS, InferenceConfig
from scenarios.verdict import Check

MIN_PROMPT = 4


def make_requests(
    config: InferenceConfig, tokenizer: Tokenizer, num_positions: int, seed: int
) -> list[Request]:
    """Requests whose prompts are pieces of the case's text, of different places and lengths.

    Args:
        config: of the scenario.
        tokenizer: of the model.
        num_positions: of the model.
        seed: of the draws.

    Raises:
        ValueError: the text is too short for them.
    """
    (tokens,) = tokenizer.encode([config.prompt])
    room = num_positions - config.num_tokens_to_generate
    longest = min(len(tokens) - config.num_requests, room)
    if longest < MIN_PROMPT:
        raise ValueError(
            f"prompt: got {len(tokens)} tokens and {room} positions for it, expected at least "
            f"{config.num_requests} (the number of requests) + {MIN_PROMPT}, and {MIN_PROMPT}"
        )
    sampling = Sampling.build(
        max_new_tokens=config.num_tokens_to_generate,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p or 1.0,
        seed=seed,
        prompt_log_probs=True,
    )
    lengths = [
        MIN_PROMPT + 13 * number % (longest - MIN_PROMPT + 1)
        for number in range(config.num_requests)
    ]
    return [
        Request(
            id=f"request {number:02}", prompt=tuple(tokens[number:][:length]), sampling=sampling
        )
        for number, length in enumerate(lengths)
    ]


def metrics_of_completions(completions: Sequence[Completion], tokenizer: Tokenizer) -> Metrics:
    """``REQUEST METRIC`` -> values by place, for the comparison with a golden."""
    metrics: Metrics = {}
    for done in completions:
        columns: list[Sequence[Value]] = [
            done.tokens,
            [tokenizer.decode(done.tokens)],
            done.log_probs,
            done.prompt_log_probs,
            done.digests,
        ]
        for name, column in zip(INFERENCE_METRICS, columns, strict=True):
            values = dict(enumerate(column, 1))
            if values:
                metrics[f"{done.id} {name}"] = Metric(1, len(values), 1, values)
    return metrics


def check_completions(requests: Sequence[Request], completions: Sequence[Completion]) -> Check:
    """Every request was answered once, in full length and with finite numbers."""
    name = "complete and finite"
    expected, got = [r.id for r in requests], [c.id for c in completions]
    if got != expected:
        wrong = sorted(set(expected) ^ set(got)) or sorted(got)
        return Check(name, False, f"{', '.join(wrong)}: missing, extra or twice")
    for request, done in zip(requests, completions, strict=True):
        num = request.sampling.max_new_tokens
        lengths = [len(done.tokens), len(done.log_probs), len(done.digests)]
        if lengths != [num] * 3 or done.reason != "length":
            return Check(name, False, f"{done.id}: got {lengths} values, expected {num} of each")
        if len(done.prompt_log_probs) != len(request.prompt) - 1:
            got_num, num = len(done.prompt_log_probs), len(request.prompt) - 1
            return Check(name, False, f"{done.id}: got {got_num} prompt logprobs, expected {num}")
        if not all(map(math.isfinite, [*done.log_probs, *done.prompt_log_probs])):
            return Check(name, False, f"{done.id}: a logprob is not finite")
    num_tokens = sum(len(done.tokens) for done in completions)
    return Check(name, True, f"{len(requests)} requests, {num_tokens} tokens")


def check_replicas(completions: Sequence[Completion], num_replicas: int) -> Check:
    """Every replica did at least half of its share."""
    counts = [[c.replica for c in completions].count(index) for index in range(num_replicas)]
    passed = min(counts) * 2 * num_replicas >= len(completions)
    return Check("replicas busy", passed, " + ".join(map(str, counts)) + " requests")


def check_same(name: str, first: Metrics, second: Metrics) -> Check:
    """The same requests gave the same again."""
    return Check.of(name, compare_strict(first, second))


def describe_speed(completions: Sequence[Completion], wall_s: float) -> str:
    """Throughput, time to the first token, and time between tokens."""
    num_tokens = sum(len(done.tokens) for done in completions)
    firsts = [done.token_times_s[0] for done in completions]
    between = [
        later - earlier
        for done in completions
        for earlier, later in zip(done.token_times_s, done.token_times_s[1:], strict=False)
    ]
    return (
        f"{num_tokens / wall_s:.0f} tokens/s; first token {_percentiles(firsts)}; "
        f"between tokens {_percentiles(between)}"
    )


def _percentiles(times_s: list[float]) -> str:
    ordered = sorted(times_s) or [math.nan]
    shown = (ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1000 for p in (50, 90, 99))
    return "p50/p90/p99 " + "/".join(f"{time_ms:.0f}" for time_ms in shown) + " ms"
