"""How far a run in native arithmetic may lie from its golden; docs/comparison.md derives it.

[Note: tolerances] Two runs that differ only in orders of sums and in the approximations of
elementary functions differ in every step's gradient by rounding noise. AdamW turns it into a
distance between their parameters of ``noise * lr`` per element and step, and a random distance d
per element moves a number with gradient norm G by G * d. Every bound is ``SAFETY`` such standard
deviations. What has no bound, learning rate and loss scale, must have equal bits.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from scenarios.compare import Comparison, Difference, compare_strict
from scenarios.golden import MEASURED, Metrics
from scenarios.scenario import ModelConfig, Scenario

SAFETY = 4.0
"""Standard deviations between what is expected of rounding and what fails."""
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
ROUNDINGS_PER_LAYER = 10
"""Operations of a layer whose results are rounded: two norms, four projections, scores, softmax,
context and activation; dropout and residual additions round what is rounded already."""
UNJUDGED = MEASURED | {"params-digest"}
"""Differs between any two machines, and says nothing about how near they are."""
COSTS: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("iteration-time", "median step time", statistics.median),
    ("mem-max-allocated-bytes", "memory", max),
)
FEWER_TOKENS = 8
"""BERT predicts 15 % of its tokens: at least one in so many."""
MOVED_BY_TOKENS = ("lm loss", "aux loss", "grad-norm", "num-zeros")
"""With experts: a token that goes elsewhere can move a spike to another step, and an expert that
gets no token has a gradient of zeros. So medians over all steps are judged, of zeros nothing."""


@dataclass(frozen=True)
class Noise:
    """What rounding is expected to do in one step of a scenario."""

    gradient: float
    """Relative size of the difference between two computations of one gradient."""
    num_terms: dict[str, int]
    """Of which a loss is the mean, by its name."""

    @classmethod
    def of(cls, scenario: Scenario) -> "Noise":
        """Derived from dtype, depth and the longest sum."""
        model, training = scenario.model, scenario.training
        num_tokens = training.global_batch_size * model.seq_length
        longest = max(model.vocab_size, model.ffn_hidden_size, num_tokens)
        once = UNIT_ROUNDOFF[model.precision] + UNIT_ROUNDOFF["fp32"] * math.sqrt(longest)
        through = once * math.sqrt(_num_roundings(model))
        # A router whose logits differ by this sends this part of the tokens elsewhere, which
        # changes all they contribute; independent changes add up by their squares.
        gradient = math.sqrt(through) if model.moe else through
        samples = training.global_batch_size
        judged = num_tokens // FEWER_TOKENS if scenario.family == "bert" else num_tokens
        terms = {"lm loss": judged, "aux loss": num_tokens, "sop loss": samples}
        return cls(gradient, terms)


def _num_roundings(model: ModelConfig) -> int:
    """On the longest path: forward and back through all layers, embedding, last norm and head."""
    return 2 * (ROUNDINGS_PER_LAYER * model.num_layers + 3)


def bounds(scenario: Scenario, golden: Metrics) -> dict[str, dict[int, float]]:
    """The largest differences that are forgiven.

    Args:
        scenario: how the golden was trained.
        golden: its values, from the first step or from the one after a common checkpoint.

    Returns:
        Metric -> step -> bound, for the metrics that are judged step by step. A skipped step has
        no bound for what has no value in it.
    """
    noise = Noise.of(scenario)
    found: dict[str, dict[int, float]] = {}
    norms, zeros = _numbers(golden, "grad-norm"), _numbers(golden, "num-zeros")
    slope = max(norms.values(), default=0.0)
    drift = rate_before = 0.0
    for step, rate in _numbers(golden, "learning-rate").items():
        for name in noise.num_terms.keys() & golden.keys():
            of_mean = noise.gradient / math.sqrt(noise.num_terms[name])
            value = _numbers(golden, name)[step]
            found.setdefault(name, {})[step] = SAFETY * (of_mean * abs(value) + slope * drift)
        if step in norms:
            drift += noise.gradient * max(rate, rate_before)
        if step in norms:
            found.setdefault("grad-norm", {})[step] = SAFETY * noise.gradient * norms[step]
        if step in zeros:
            # Zeros come in rows, as of a word whose tokens have no gradient.
            width = scenario.model.hidden_size
            of_rows = width * math.sqrt(1 + zeros[step] / width)
            found.setdefault("num-zeros", {})[step] = SAFETY * of_rows
        found.setdefault("params-norm", {})[step] = SAFETY * drift
        rate_before = rate
    return found


def compare_golden(scenario: Scenario, golden: Metrics, actual: Metrics) -> Comparison:
    """All bits in canonical arithmetic, ``bounds`` in native arithmetic.

    Args:
        scenario: how both were trained.
        golden: what is expected.
        actual: what a run logged.
    """
    if scenario.arithmetic == "canonical":
        return compare_strict(golden, actual)
    golden, actual = _judged(golden), _judged(actual)
    allowed = bounds(scenario, golden)
    strict = compare_strict(golden, actual)
    kept, worst = [], (0.0, "")
    for difference in strict.differences:
        share = _share(difference, allowed, scenario)
        if share > 1.0:
            kept.append(difference)
        else:
            worst = max(worst, (share, f"{difference.metric} step {difference.step}"))
    if scenario.model.moe:
        kept += _moved_medians(golden, actual, allowed)
    nearest = f" (the nearest, {worst[1]}, used {worst[0]:.1%} of its own)" if worst[1] else ""
    return Comparison(tuple(kept), strict.num_values, f"within derived tolerances{nearest}")


def _share(
    difference: Difference, allowed: dict[str, dict[int, float]], scenario: Scenario
) -> float:
    """How much of what is forgiven this difference uses; more than 1 fails."""
    expected, actual = difference.expected, difference.actual
    if difference.problem != "differs" or isinstance(expected, str) or isinstance(actual, str):
        return math.inf
    assert difference.step is not None
    assert expected is not None
    assert actual is not None
    if scenario.model.moe and difference.metric in MOVED_BY_TOKENS:
        return 0.0
    bound = allowed.get(difference.metric, {}).get(difference.step, 0.0)
    return abs(actual - expected) / bound if bound else math.inf


def _moved_medians(
    golden: Metrics, actual: Metrics, allowed: dict[str, dict[int, float]]
) -> list[Difference]:
    """The medians that differ by more than the median bound."""
    moved = []
    for name in MOVED_BY_TOKENS[:-1]:
        values = [list(_numbers(metrics, name).values()) for metrics in (golden, actual)]
        if not all(values):
            continue
        expected, got = (statistics.median(of_steps) for of_steps in values)
        if abs(got - expected) > statistics.median(allowed[name].values()):
            what = "median over all steps differs"
            moved.append(Difference(name, None, what, expected, got))
    return moved


def describe_cost(golden: Metrics, actual: Metrics) -> str:
    """Speed and memory beside the golden's, for information; empty where they were not recorded."""
    told = []
    for name, what, of_steps in COSTS:
        theirs, ours = (list(_numbers(metrics, name).values()) for metrics in (golden, actual))
        if theirs and ours:
            told.append(f"{what} {of_steps(ours) / of_steps(theirs):.2f} of the golden's")
    return ", ".join(told)


def _judged(metrics: Metrics) -> Metrics:
    return {name: metric for name, metric in metrics.items() if name not in UNJUDGED}


def _numbers(metrics: Metrics, name: str) -> dict[int, float]:
    """The values that are numbers, by step; none for a metric that is not there."""
    if name not in metrics:
        return {}
    values = metrics[name].values.items()
    return {step: float(value) for step, value in values if not isinstance(value, str)}
