"""What the commands of ``testbed`` do, without how it is shown."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenarios.compare import Comparison, compare_strict
from scenarios.failures import RunFailed
from scenarios.golden import (
    Golden,
    Metrics,
    metrics_from_steps,
    read_golden,
    read_golden_file,
    write_atomically,
    write_golden,
)
from scenarios.launch import check_port
from scenarios.megatron_rules import DEFAULT_METRICS, MetricVerdict, compare_megatron
from scenarios.metrics_file import read_steps
from scenarios.provenance import provenance
from scenarios.runner import LaunchOptions, Played, check_golden, make_out_dir, play
from scenarios.schema import Scenario, list_scenarios, load_scenario
from scenarios.verdict import Check, Verdict, difference_lines

__all__ = [
    "LaunchOptions",
    "Recording",
    "all_cases",
    "compare_files",
    "golden_of",
    "judge_case",
    "list_rows",
    "record_case",
]


def judge_case(
    case: str,
    *,
    scale: str,
    layout: str | None,
    resume_layout: str | None,
    data: Path | None,
    out: Path | None,
    options: LaunchOptions,
) -> Verdict:
    """Runs a case, holds it against its golden and writes ``verdict.json``.

    Args:
        case, scale, layout, data: as for ``load_scenario``.
        resume_layout: of run 2; None: that of run 1.
        out: new or empty folder; None: one in ``runs/``.
        options: how the ranks are started.

    Raises:
        ValueError: bad input, or no golden was recorded for this scale.
        RunFailed: a run crashed, hung or was interrupted.
    """
    scenario = load_scenario(case, scale=scale, layout=layout, data=data)
    resumed = None
    if resume_layout is not None:
        resumed = load_scenario(case, scale=scale, layout=resume_layout, data=data)
        if scenario.test_type != "ckpt-resume":
            raise ValueError(f"--resume-layout: {case} is a {scenario.test_type} test: no resume")
    golden = None if scenario.data.prefix else golden_of(scenario, case)
    note = "" if golden else "own data has no golden: only the invariants were judged"
    check_port(options.master_port)
    out_dir = make_out_dir(out, scenario.name)
    played = _play(scenario, out_dir, options, resumed)
    checks = [*played.checks, *([check_golden(golden, played.metrics)] if golden else [])]
    return _verdict(scenario, out_dir, played, checks, note)


def all_cases(scale: str) -> list[str]:
    """Names of the shipped cases that have this scale."""
    return [info.name for info in list_scenarios() if scale in info.layouts]


@dataclass(frozen=True)
class Recording:
    """What ``record`` did, or why it did not."""

    verdict: Verdict
    path: Path
    written: bool
    changes: Comparison | None
    """Against the old golden, None without one."""

    @property
    def exit_code(self) -> int:
        """0 if the file holds this run's values, 1 if they were refused."""
        return self.verdict.exit_code

    def lines(self) -> list[str]:
        """The verdict on the invariants, what changed, and what was written."""
        lines = self.verdict.lines()
        if not self.verdict.passed:
            return [*lines, f"refused: not recorded in {self.path}"]
        if self.changes is None:
            return [*lines, f"recorded, for the first time: {self.path}"]
        if not self.written:
            return [*lines, f"unchanged, not written: {self.path}"]
        changed = [f"against the old golden {self.changes.summary}:"]
        return [*lines, *changed, *difference_lines(self.changes, "  "), f"recorded: {self.path}"]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        changes = self.changes.differences if self.changes else ()
        return {
            "verdict": self.verdict.as_json(),
            "golden": str(self.path),
            "written": self.written,
            "changes": [difference.as_json() for difference in changes],
            "exit_code": self.exit_code,
        }


def record_case(
    case: str,
    *,
    scale: str,
    layout: str | None,
    out: Path | None,
    command: str,
    options: LaunchOptions,
) -> Recording:
    """Runs a case and records run 1 as its golden, unless an invariant fails or nothing changed.

    Raises:
        ValueError: bad input, own data, or a golden file that cannot be read.
        RunFailed: a run crashed, hung or was interrupted.
    """
    scenario = load_scenario(case, scale=scale, layout=layout)
    if scenario.data.prefix:
        raise ValueError(f"{case}: reads own data from {scenario.data.prefix}; goldens need none")
    path = scenario.golden_path
    old = read_golden_file(path).get(scale) if path.exists() else None
    check_port(options.master_port)
    out_dir = make_out_dir(out, scenario.name)
    played = _play(scenario, out_dir, options)
    verdict = _verdict(scenario, out_dir, played, list(played.checks), "")
    changes = compare_strict(old.metrics, played.metrics) if old else None
    write = verdict.passed and not (changes and changes.passed)
    if write:
        origin = provenance(command, scale, str(scenario.layout))
        write_golden(path, scale, Golden(played.metrics, origin))
    return Recording(verdict, path, write, changes)


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
        ValueError: a file that cannot be read, or one with several scales and none named.
    """
    expected, got = _load_metrics(golden, scale), _load_metrics(actual, scale)
    if rules == "megatron":
        verdicts = compare_megatron(expected, got, metrics or DEFAULT_METRICS)
        return FileComparison(rules, golden, actual, megatron=tuple(verdicts))
    return FileComparison(rules, golden, actual, strict=compare_strict(expected, got))


def list_rows() -> list[dict[str, Any]]:
    """One row for each scenario and scale."""
    rows = []
    for info in list_scenarios():
        for scale, layout in sorted(info.layouts.items()):
            path = load_scenario(str(info.path), scale=scale).golden_path
            row = {
                "alias": info.alias,
                "family": info.family,
                "name": info.name,
                "scale": scale,
                "layout": str(layout),
                "num_ranks": layout.world_size,
                "test_type": info.test_type,
                "golden": path.exists() and scale in read_golden_file(path),
            }
            rows.append(row)
    return rows


def golden_of(scenario: Scenario, case: str) -> Golden:
    """The golden of a case at its scale.

    Raises:
        ValueError: none was recorded; the message says how to.
    """
    path = scenario.golden_path
    how = f"record it with: testbed record {case} --scale {scenario.scale}"
    if not path.exists():
        raise ValueError(f"no golden recorded: {path} does not exist; {how}")
    if scenario.scale not in read_golden_file(path):
        raise ValueError(f"no golden recorded for scale {scenario.scale} in {path}; {how}")
    return read_golden(path, scenario.scale)


def _play(
    scenario: Scenario, out_dir: Path, options: LaunchOptions, resumed: Scenario | None = None
) -> Played:
    """Plays; a failed run leaves its failure as the verdict."""
    try:
        return play(scenario, out_dir, options, resumed)
    except RunFailed as error:
        _write_verdict(out_dir, {"verdict": "run failed", "exit_code": 3, "error": error.as_json()})
        raise


def _write_verdict(out_dir: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1, allow_nan=False)
    write_atomically(out_dir / "verdict.json", text + "\n")


def _verdict(
    scenario: Scenario, out_dir: Path, played: Played, checks: list[Check], note: str
) -> Verdict:
    verdict = Verdict(
        case=f"{scenario.family}/{scenario.name}",
        scale=scenario.scale,
        layout=str(scenario.layout),
        num_ranks=scenario.layout.world_size,
        out_dir=out_dir,
        runs=played.runs,
        checks=tuple(checks),
        note=note,
    )
    _write_verdict(out_dir, verdict.as_json())
    return verdict


def _load_metrics(path: Path, scale: str | None) -> Metrics:
    """Metrics from a run's folder, a metrics.jsonl or a golden file."""
    if path.is_dir():
        inside = [path / "metrics.jsonl", path / "run1" / "metrics.jsonl"]
        found = next((file for file in inside if file.exists()), None)
        if found is None:
            raise ValueError(f"{path}: expected a run's folder, got one without metrics.jsonl")
        path = found
    if path.suffix == ".jsonl":
        return metrics_from_steps(read_steps(path))
    scales = read_golden_file(path)
    if scale is not None and "" not in scales:
        return read_golden(path, scale).metrics
    if len(scales) > 1:
        raise ValueError(f"{path}: holds the scales {', '.join(scales)}; name one by --scale")
    return next(iter(scales.values())).metrics
