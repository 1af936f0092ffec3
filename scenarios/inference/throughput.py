"""Throughput beside what was recorded on the same kind of machine: told, never judged.

The rule: a run has ``ROUNDS`` rounds of the same requests, and so had the recorded one. It counts
as slower only when its best round is below the recorded worst one by more than ``MARGIN``, faster
when its worst is above the recorded best by as much; all between is noise. On another CPU or in
another layout nothing is compared.
"""

from pathlib import Path

from scenarios.golden import Golden, Metric, read_golden_file, write_golden
from scenarios.machine import machine_key
from scenarios.provenance import cpu_model, provenance
from scenarios.scenario import Scenario

ROUNDS = 3
MARGIN = 0.1
METRIC = "throughput"


def throughput_path(scenario: Scenario) -> Path:
    """Where the throughput of a case is recorded on this kind of machine."""
    return scenario.golden_path.with_name(f"golden_values_{machine_key()}.json")


def record_throughput(scenario: Scenario, rounds_tokens_s: tuple[float, ...], command: str) -> Path:
    """Writes the rounds of a run; returns the file."""
    path = throughput_path(scenario)
    values = dict(enumerate(rounds_tokens_s, 1))
    metric = Metric(1, len(values), 1, dict(values))
    origin = provenance(command, scenario.scale, str(scenario.layout), scenario.arithmetic)
    write_golden(path, scenario.scale, Golden({METRIC: metric}, origin))
    return path


def describe_throughput(scenario: Scenario, rounds_tokens_s: tuple[float, ...]) -> str:
    """One line: this run's rounds and, where there is one, the recorded run's."""
    told = f"throughput {_range(rounds_tokens_s)} tokens/s"
    path = throughput_path(scenario)
    golden = read_golden_file(path).get(scenario.scale) if path.exists() else None
    if golden is None or METRIC not in golden.metrics:
        return f"{told}; none is recorded for this machine"
    origin = golden.provenance
    here = {"cpu": cpu_model(), "layout": str(scenario.layout)}
    if any(origin.get(name) != value for name, value in here.items()):
        return f"{told}; recorded on {origin.get('cpu')} in {origin.get('layout')}"
    recorded = tuple(float(value) for value in golden.metrics[METRIC].values.values())
    return f"{told}, {compare_rounds(recorded, rounds_tokens_s)} the recorded {_range(recorded)}"


def compare_rounds(recorded: tuple[float, ...], actual: tuple[float, ...]) -> str:
    """By the rule above."""
    if max(actual) < min(recorded) * (1 - MARGIN):
        return "slower than"
    if min(actual) > max(recorded) * (1 + MARGIN):
        return "faster than"
    return "within the noise of"


def _range(values: tuple[float, ...]) -> str:
    return f"{min(values):.0f}..{max(values):.0f}"
