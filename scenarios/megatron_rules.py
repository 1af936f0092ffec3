"""Megatron-LM's own comparison of a run with its golden files, as an opt-in.

It is here to read Megatron's golden files by Megatron's rules, not to trust them. Its holes, kept
as they are because a faithful reading needs them, and absent from ``scenarios.compare``:

- values are rounded to 5 decimals before anything is compared;
- a ``"nan"`` string and a missing step both become infinity, and infinity equals infinity;
- of n steps, min(max(n // 100, 1), 50) may be off by any amount: one loss of 1e9 in 100
  steps passes;
- steps and metrics that the golden lacks are ignored;
- the iteration time is one median, of steps 5..20 or 30..45.

Source: Megatron-LM tests/functional_tests/python_test_utils (common.py,
test_pretraining_regular_pipeline.py), in its mode that compares approximately; it skips the exact
test there, which is reported for information.
"""

import math
import statistics
from dataclasses import dataclass

from scenarios.golden import Metric, Metrics, Value

RELATIVE_TOLERANCE = {
    "lm loss": 0.05,
    "mtp_1 loss": 0.05,
    "mtp_2 loss": 0.05,
    "num-zeros": 0.20,
    "iteration-time": 0.05,
    "mem-allocated-bytes": 0.05,
    "mem-max-allocated-bytes": 0.05,
}
DEFAULT_METRICS = ("lm loss", "num-zeros")
"""What Megatron judges when a case names no METRICS."""


@dataclass(frozen=True)
class MetricVerdict:
    """One metric by Megatron's rules."""

    metric: str
    passed: bool
    detail: str


def compare_megatron(
    golden: Metrics, actual: Metrics, names: tuple[str, ...] = DEFAULT_METRICS
) -> list[MetricVerdict]:
    """Judges by Megatron's rules.

    Args:
        golden: a golden file of Megatron, or ours.
        actual: a run.
        names: the metrics to judge.

    Returns:
        One verdict for each name; the run passes if all do.

    Raises:
        ValueError: no names, a metric without a rule, or one that either side lacks.
    """
    if not names:
        raise ValueError("--metric: got none, expected at least one to judge")
    verdicts = []
    for name in names:
        if name not in RELATIVE_TOLERANCE:
            known = ", ".join(RELATIVE_TOLERANCE)
            raise ValueError(f"--metric {name}: Megatron has no rule for it; it has for {known}")
        for side, metrics in (("golden", golden), ("actual", actual)):
            if name not in metrics:
                have = ", ".join(metrics)
                raise ValueError(f"metric {name}: not in the {side} values; they hold {have}")
        verdicts.append(_judge(name, golden[name], actual[name]))
    return verdicts


def _judge(name: str, golden: Metric, actual: Metric) -> MetricVerdict:
    tolerance = RELATIVE_TOLERANCE[name]
    expected = [_number(value) for value in golden.values.values()]
    got = [_number(actual.values.get(step)) for step in golden.values]
    if name == "iteration-time":
        window = range(5, 21) if max(golden.values) <= 25 else range(30, 46)
        inside = [number for number, step in enumerate(golden.values) if step in window]
        if not inside:
            return MetricVerdict(name, False, f"no step in {window.start}..{window.stop - 1}")
        expected = [statistics.median(expected[i] for i in inside)]
        got = [statistics.median(got[i] for i in inside)]
        num_steps, num_forgiven = 1.0, 0.0
    else:
        num_steps = (golden.end_step - golden.start_step) / golden.step_interval + 1
        num_forgiven = 0.0 if num_steps == 1 else min(max(num_steps // 100, 1), 50)
    close = [_is_close(a, b, tolerance) for a, b in zip(got, expected, strict=True)]
    equal = [a == b for a, b in zip(got, expected, strict=True)]
    passed = sum(close) / len(close) >= 1 - num_forgiven / num_steps
    detail = (
        f"{sum(close)} of {len(close)} within {tolerance:.0%} "
        f"({num_forgiven:.0f} forgiven), {sum(equal)} equal to 5 decimals"
    )
    return MetricVerdict(name, passed, detail)


def _number(value: Value | None) -> float:
    """As Megatron does: what is not a number is infinity."""
    return math.inf if value is None or isinstance(value, str) else round(value, 5)


def _is_close(actual: float, golden: float, tolerance: float) -> bool:
    """numpy.isclose without an absolute tolerance."""
    if math.isinf(actual) or math.isinf(golden):
        return actual == golden
    return abs(actual - golden) <= tolerance * abs(golden)
