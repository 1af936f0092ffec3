"""Tolerances of native goldens: what they forgive, what they refuse, and which file is asked."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenarios import commands
from scenarios.compare_files import compare_files
from scenarios.golden import Golden, Metrics, Value, metrics_from_steps, read_golden, write_golden
from scenarios.machine import KEYS, machine_key
from scenarios.scenario import Scenario
from scenarios.schema import load_scenario
from scenarios.tolerance import Noise, bounds, compare_golden, describe_cost
from scenarios.worker import Job
from tests.engine_scenarios import tiny_scenario

NUM_STEPS = 6
NATIVE = {"arithmetic": "native"}


def native(**how: Any) -> Scenario:
    return tiny_scenario("dp1", **how).model_copy(update=NATIVE)


def native_moe() -> Scenario:
    return native(family="moe", precision="bf16")


def values_of(step: int) -> dict[str, Value]:
    return {
        "lm loss": 4.0 - 0.1 * step,
        "aux loss": 1.0 + 0.01 * step,
        "grad-norm": "nan" if step == 2 else 2.0 / step,
        "num-zeros": "nan" if step == 2 else 100,
        "params-norm": 10.0 + 0.01 * step,
        "learning-rate": 0.001 * step,
        "loss-scale": 1024.0,
        "params-digest": "0123456789abcdef",
        "iteration-time": 0.1 * step,
        "mem-max-allocated-bytes": 1000 + step,
    }


GOLDEN = metrics_from_steps({s: values_of(s) for s in range(1, NUM_STEPS + 1)}, measured=True)
BOUNDED = ("lm loss", "aux loss", "grad-norm", "num-zeros", "params-norm")


def changed(name: str, step: int, value: Value) -> Metrics:
    metrics = copy.deepcopy(GOLDEN)
    metrics[name].values[step] = value
    return metrics


@given(st.sampled_from(BOUNDED), st.sampled_from([1, 3, 6]), st.floats(-3, 3))
def test_a_difference_passes_exactly_within_its_bound(name: str, step: int, share: float) -> None:
    allowed = bounds(native(), GOLDEN)[name][step]
    near = GOLDEN[name].values[step]
    assert isinstance(near, (int, float))
    comparison = compare_golden(native(), GOLDEN, changed(name, step, near + share * allowed))
    if not 0.999 < abs(share) < 1.001:
        assert comparison.passed == (abs(share) < 1)


@pytest.mark.parametrize(
    ("name", "step", "value"),
    [
        ("learning-rate", 3, 0.003 * (1 + 2.0**-52)),
        ("loss-scale", 3, 512.0),
        ("grad-norm", 3, "nan"),
        ("grad-norm", 2, 1.0),
        ("lm loss", 3, float("nan")),
        ("lm loss", 3, float("inf")),
        ("lm loss", 3, 4),
    ],
)
def test_what_rounding_cannot_do_fails(name: str, step: int, value: Value) -> None:
    (difference,) = compare_golden(native(), GOLDEN, changed(name, step, value)).differences
    assert (difference.metric, difference.step) == (name, step)


def test_missing_metrics_and_steps_fail() -> None:
    without = {name: metric for name, metric in GOLDEN.items() if name != "grad-norm"}
    short = copy.deepcopy(GOLDEN)
    del short["lm loss"].values[NUM_STEPS]
    assert not compare_golden(native(), GOLDEN, without).passed
    assert not compare_golden(native(), without, GOLDEN).passed
    assert not compare_golden(native(), GOLDEN, short).passed
    assert not compare_golden(native(), {}, {}).passed


@pytest.mark.parametrize("name", ["iteration-time", "mem-max-allocated-bytes", "params-digest"])
def test_time_memory_and_digest_are_not_judged(name: str) -> None:
    value: Value = "f" * 16 if name == "params-digest" else 10**6
    assert compare_golden(native(), GOLDEN, changed(name, 3, value)).passed
    without = {other: metric for other, metric in GOLDEN.items() if other != name}
    assert compare_golden(native(), without, GOLDEN).passed


def test_cost_is_told_beside_the_golden() -> None:
    slower = metrics_from_steps(
        {
            s: {**values_of(s), "iteration-time": 0.3 * s, "mem-max-allocated-bytes": 503}
            for s in range(1, NUM_STEPS + 1)
        },
        measured=True,
    )
    told = "median step time 3.00 of the golden's, memory 0.50 of the golden's"
    assert describe_cost(GOLDEN, slower) == told
    assert describe_cost(metrics_from_steps({1: values_of(1)}), slower) == ""


def test_canonical_arithmetic_has_no_tolerance() -> None:
    scenario = tiny_scenario("dp1")
    canonical = metrics_from_steps({s: values_of(s) for s in range(1, NUM_STEPS + 1)})
    nudged = copy.deepcopy(canonical)
    nudged["lm loss"].values[3] = 3.7 + 2.0**-51
    assert compare_golden(scenario, canonical, canonical).passed
    assert not compare_golden(scenario, canonical, nudged).passed
    assert compare_golden(native(), canonical, nudged).passed


def test_with_experts_a_spike_may_move_but_the_median_may_not() -> None:
    spike = changed("grad-norm", 6, 50.0)
    spike["num-zeros"].values[4] = 10**6
    assert compare_golden(native_moe(), GOLDEN, spike).passed
    assert not compare_golden(native(), GOLDEN, spike).passed
    larger = copy.deepcopy(GOLDEN)
    for step, value in larger["grad-norm"].values.items():
        if not isinstance(value, str):
            larger["grad-norm"].values[step] = 3.0 * value
    (difference,) = compare_golden(native_moe(), GOLDEN, larger).differences
    assert "median over all steps differs" in str(difference)


def test_bounds_grow_with_dtype_depth_and_steps() -> None:
    noises = [Noise.of(native(precision=p)).gradient for p in ("fp32", "fp16", "bf16")]
    assert noises == sorted(noises)
    assert Noise.of(native_moe()).gradient > noises[-1]
    deeper = native().model.model_copy(update={"num_layers": 40})
    assert Noise.of(native().model_copy(update={"model": deeper})).gradient > noises[1]
    drift = list(bounds(native(), GOLDEN)["params-norm"].values())
    assert drift[0] > 0
    assert drift[1] == drift[0], "a skipped step moves nothing"
    assert drift[1:] == sorted(set(drift))


def test_the_machine_is_named_by_its_gpu(tmp_path: Path) -> None:
    assert machine_key(tmp_path) == "lts"
    for model, key in KEYS.items():
        gpus = tmp_path / model
        (gpus / "0000:01:00.0").mkdir(parents=True)
        (gpus / "0000:01:00.0" / "information").write_text(f"Model: \t\t NVIDIA {model}-SXM4\n")
        assert machine_key(gpus) == key
    other = tmp_path / "other" / "0000:01:00.0"
    other.mkdir(parents=True)
    (other / "information").write_text("Model: NVIDIA T4\n")
    assert machine_key(tmp_path / "other") == "lts"


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scenario:
    """S1 in native arithmetic on a machine with an H100, its goldens in tmp_path."""
    path = tmp_path / "golden_values_dev_dgx_h100.json"
    monkeypatch.setattr(Scenario, "golden_path", property(lambda self: path))
    return load_scenario("S1", scale="ci", arithmetic="native")


def test_the_machines_own_golden_comes_before_that_of_any_machine(scenario: Scenario) -> None:
    path = scenario.golden_path
    with pytest.raises(ValueError, match=r"no golden recorded.*h100.*--arithmetic native"):
        commands.golden_of(scenario, "S1")
    any_machine = path.with_name("golden_values_lts.json")
    write_golden(any_machine, "full", Golden(GOLDEN, {**NATIVE, "cpu": "full"}))
    with pytest.raises(ValueError, match=r"no golden recorded for scale ci in .*lts"):
        commands.golden_of(scenario, "S1")
    write_golden(any_machine, "ci", Golden(GOLDEN, {**NATIVE, "cpu": "any"}))
    assert commands.golden_of(scenario, "S1").provenance["cpu"] == "any"
    write_golden(path, "ci", Golden(GOLDEN, {**NATIVE, "cpu": "own"}))
    assert commands.golden_of(scenario, "S1").provenance["cpu"] == "own"


def test_arithmetics_are_never_compared(scenario: Scenario, tmp_path: Path) -> None:
    path = scenario.golden_path
    write_golden(path, "ci", Golden(GOLDEN, {"commit": "of an older version"}))
    assert read_golden(path, "ci").arithmetic == "canonical"
    with pytest.raises(ValueError, match="holds canonical values; a run in native arithmetic"):
        commands.golden_of(scenario, "S1")

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "metrics": {"lm loss": 4.0}}\n')
    job = Job(scenario.model_dump_json(), str(tmp_path), "", False, "")
    job.write()
    choices: dict[str, Any] = {"rules": "strict", "metrics": (), "scale": None}
    with pytest.raises(ValueError, match=r"canonical values and .* native ones"):
        compare_files(path, metrics, **choices)
    write_golden(path, "ci", Golden(GOLDEN, NATIVE))
    comparison = compare_files(path, metrics, **choices)
    assert comparison.strict is not None
    assert comparison.strict.num_values > 1
    canonical = scenario.model_copy(update={"arithmetic": "canonical"})
    dataclasses.replace(job, scenario=canonical.model_dump_json()).write()
    with pytest.raises(ValueError, match=r"native values and .* canonical ones"):
        compare_files(path, metrics, **choices)


def test_the_paths_of_the_two_arithmetics_differ() -> None:
    paths = [
        load_scenario("S1", scale="ci", arithmetic=arithmetic).golden_path.name
        for arithmetic in ("canonical", "native")
    ]
    assert paths == ["golden_values_canonical.json", f"golden_values_{machine_key()}.json"]
