"""What ``testbed compare`` does: two files, or a run's folder and a file, by one set of rules."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenarios.compare import Comparison, compare_strict
from scenarios.golden import (
    Metrics,
    metrics_from_steps,
    read_golden,
    read_golden_file,
    without_measured,
)
from scenarios.megatron_rules import DEFAULT_METRICS, MetricVerdict, compare_megatron
from scenarios.metrics_file import read_steps
from scenarios.schema import Scenario
from scenarios.tolerance import compare_golden
from scenarios.verdict import difference_lines


@dataclass(frozen=True)
class FileComparison:
    """Two files by one set of rules."""

    rules: str
    golden: Path
    actual: Path
    strict: Comparison | None = None
    megatron: tuple[MetricVerdict, ...] = ()

    @property
    def passed(self) -> bool:
        """The verdict of the rules."""
        if self.strict:
            return self.strict.passed
        return bool(self.megatron) and all(verdict.passed for verdict in self.megatron)

    def lines(self) -> list[str]:
        """The outcome as text."""
        word = "PASS" if self.passed else "FAIL"
        if self.strict:
            return [*difference_lines(self.strict, "  "), f"{word}  {self.strict.summary}"]
        rows = [
            f"  {'pass' if v.passed else 'FAIL'}  {v.metric}: {v.detail}" for v in self.megatron
        ]
        return [*rows, f"{word}  by Megatron's rules, which miss much (see docs/comparison.md)"]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        differences = self.strict.differences if self.strict else ()
        return {
            "rules": self.rules,
            "golden": str(self.golden),
            "actual": str(self.actual),
            "verdict": "pass" if self.passed else "fail",
            "num_values": self.strict.num_values if self.strict else None,
            "differences": [difference.as_json() for difference in differences],
            "metrics": [vars(verdict) for verdict in self.megatron],
        }


def compare_files(
    golden: Path, actual: Path, *, rules: str, metrics: tuple[str, ...], scale: str | None
) -> FileComparison:
    """Compares a run, or another golden, with a golden.

    Raises:
        ValueError: a file that cannot be read, one with several scales and none named, or two of
            different arithmetic.
    """
    expected, got = _load(golden, scale), _load(actual, scale)
    if rules == "megatron":
        verdicts = compare_megatron(expected.metrics, got.metrics, metrics or DEFAULT_METRICS)
        return FileComparison(rules, golden, actual, megatron=tuple(verdicts))
    if None not in (expected.arithmetic, got.arithmetic) and expected.arithmetic != got.arithmetic:
        raise ValueError(
            f"{golden} holds {expected.arithmetic} values and {actual} {got.arithmetic} ones; "
            "they cannot be compared"
        )
    values = without_measured(expected.metrics), without_measured(got.metrics)
    by_rules = compare_golden(got.scenario, *values) if got.scenario else compare_strict(*values)
    return FileComparison(rules, golden, actual, strict=by_rules)


@dataclass(frozen=True)
class _Loaded:
    """Metrics of a file, and what is known of how they came about."""

    metrics: Metrics
    arithmetic: str | None
    """None: of a file that does not say."""
    scenario: Scenario | None = None
    """Of a run that is still in its folder."""


def _load(path: Path, scale: str | None) -> _Loaded:
    """From a run's folder, a metrics.jsonl or a golden file."""
    if path.is_dir():
        inside = [path / "metrics.jsonl", path / "run1" / "metrics.jsonl"]
        found = next((file for file in inside if file.exists()), None)
        if found is None:
            raise ValueError(f"{path}: expected a run's folder, got one without metrics.jsonl")
        path = found
    if path.suffix == ".jsonl":
        metrics = metrics_from_steps(read_steps(path), measured=True)
        job = path.with_name("job.json")
        if not job.exists():
            return _Loaded(metrics, None)
        scenario = Scenario.model_validate_json(json.loads(job.read_text())["scenario"])
        return _Loaded(metrics, scenario.arithmetic, scenario)
    scales = read_golden_file(path)
    if scale is not None and "" not in scales:
        golden = read_golden(path, scale)
    elif len(scales) > 1:
        raise ValueError(f"{path}: holds the scales {', '.join(scales)}; name one by --scale")
    else:
        golden = next(iter(scales.values()))
    return _Loaded(golden.metrics, None if "" in scales else golden.arithmetic)
