"""Golden files and metrics files: what is written reads back as the same bits, or is refused."""

import json
import math
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenarios.golden import (
    Golden,
    Metric,
    Metrics,
    Value,
    metrics_from_steps,
    read_golden,
    read_golden_file,
    write_golden,
)
from scenarios.metrics_file import MetricsTail, MetricsWriter, read_steps

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.one_of(
    FLOATS,
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(min_value=-5e-308, max_value=5e-308),
    st.integers(min_value=0, max_value=2**63),
    st.text(alphabet="0123456789abcdef", min_size=8, max_size=64),
)


def bits(value: Value) -> object:
    """A value that is equal only to the same type and bits."""
    return struct.pack("<d", value) if isinstance(value, float) else (type(value), value)


def one_metric(values: dict[int, Value], name: str = "lm loss") -> Metrics:
    return {name: Metric(min(values), max(values), 1, values)}


@given(st.lists(VALUES, min_size=1, max_size=20))
def test_golden_values_round_trip_bit_for_bit(values: list[Value]) -> None:
    metrics = one_metric(dict(enumerate(values, 1)))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "golden.json"
        write_golden(path, "ci", Golden(metrics, {"commit": "x"}))
        back = read_golden(path, "ci")
    assert back.provenance == {"commit": "x"}
    assert [bits(v) for v in back.metrics["lm loss"].values.values()] == [bits(v) for v in values]


@given(st.lists(st.floats(), min_size=1, max_size=10))
def test_metrics_file_round_trips_also_what_is_not_finite(values: list[float]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        writer = MetricsWriter(path)
        for step, value in enumerate(values, 3):
            writer.log(step, {"lm loss": value, "num-zeros": None})
        back = [row["lm loss"] for row in read_steps(path).values()]
    assert [bits(v) for v in back if v == v] == [bits(v) for v in values if v == v]
    assert [v != v for v in back] == [math.isnan(v) for v in values]


def test_the_other_scale_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "golden.json"
    write_golden(path, "ci", Golden(one_metric({1: 0.1})))
    write_golden(path, "full", Golden(one_metric({1: 0.2})))
    write_golden(path, "ci", Golden(one_metric({1: 0.3})))
    assert read_golden(path, "ci").metrics["lm loss"].values == {1: 0.3}
    assert read_golden(path, "full").metrics["lm loss"].values == {1: 0.2}
    assert [p.name for p in path.parent.iterdir()] == ["golden.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "NaN", "loss"])
def test_a_golden_refuses_what_is_not_finite_and_keeps_the_old_file(
    tmp_path: Path, value: Value
) -> None:
    path = tmp_path / "golden.json"
    write_golden(path, "ci", Golden(one_metric({1: 0.1})))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"lm loss step 2 .* cannot be a golden"):
        write_golden(path, "ci", Golden(one_metric({1: 0.1, 2: value})))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["golden.json"]


def test_a_golden_refuses_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics"):
        write_golden(tmp_path / "golden.json", "ci", Golden({}))


def test_timings_are_left_out() -> None:
    steps: dict[int, dict[str, Value]] = {1: {"lm loss": 1.0, "iteration-time": 0.5}}
    assert list(metrics_from_steps(steps)) == ["lm loss"]


GOOD = {
    "schema": 1,
    "scales": {
        "ci": {
            "provenance": {},
            "metrics": {
                "lm loss": {
                    "start_step": 1,
                    "end_step": 2,
                    "step_interval": 1,
                    "values": {"1": 1.5, "2": 1.25},
                }
            },
        }
    },
}
GOOD_TEXT = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD_TEXT[:-20], "corrupt JSON at line 1"),
        ("", "corrupt JSON"),
        ("[" * 100000, "corrupt JSON"),
        ("\xff\x00", "corrupt JSON"),
        (GOOD_TEXT.replace("1.5", "9" * 5000), "a value: expected 64 bits, got 99"),
        (GOOD_TEXT.replace("1.5", "9" * 400), "a value: expected 64 bits, got 99"),
        ("3", "expected a JSON object"),
        (GOOD_TEXT.replace('"schema": 1', '"schema": 2'), "schema: expected 1, got 2"),
        (GOOD_TEXT.replace('"schema": 1', '"schema": true'), "schema: expected 1"),
        (GOOD_TEXT.replace("1.5", "NaN"), "finite number, got NaN"),
        (GOOD_TEXT.replace("1.5", "1e999"), "lm loss step 1: expected a finite"),
        (GOOD_TEXT.replace("1.5", '"nan"'), "lm loss step 1: expected a finite"),
        (GOOD_TEXT.replace("1.5", "null"), "lm loss step 1: expected a number"),
        (GOOD_TEXT.replace("1.5", "true"), "lm loss step 1: expected a number"),
        (GOOD_TEXT.replace('"2": 1.25', '"1": 1.25'), "key '1' appears twice"),
        (GOOD_TEXT.replace('"2": 1.25', '"3": 1.25'), "each step from 1 to 2 by 1"),
        (GOOD_TEXT.replace('"2": 1.25', '"02": 1.25'), "steps as plain decimal"),
        (GOOD_TEXT.replace('"end_step": 2', '"end_step": 3'), "each step from 1 to 3"),
        (GOOD_TEXT.replace('"step_interval": 1', '"step_interval": 0'), "step_interval >= 1"),
        (GOOD_TEXT.replace("provenance", "origin"), "keys: expected metrics, provenance"),
        ('{"schema": 1, "scales": {}}', "at least|one entry per scale"),
        ('{"schema": 1, "scales": {"ci": {"provenance": {}, "metrics": {}}}}', "at least one"),
    ],
)
def test_a_bad_golden_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "golden.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_golden_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_golden_and_a_missing_scale(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not found"):
        read_golden_file(tmp_path / "golden.json")
    write_golden(tmp_path / "golden.json", "ci", Golden(one_metric({1: 0.1})))
    with pytest.raises(ValueError, match="no golden for scale full; recorded: ci"):
        read_golden(tmp_path / "golden.json", "full")


def test_a_bare_megatron_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    body = {"start_step": 1, "end_step": 10, "step_interval": 5, "values": {"1": "nan", "5": 2.5}}
    path.write_text(json.dumps({"lm loss": body}))
    assert read_golden_file(path)[""].metrics["lm loss"] == Metric(1, 10, 5, {1: "nan", 5: 2.5})


@pytest.mark.parametrize(
    ("step", "metrics", "message"),
    [
        (3, {"lm loss": 1.0}, "step 3 logged after step 1"),
        (1, {"lm loss": 1.0}, "step 1 logged after step 1"),
        (2, {}, "no metrics"),
        (2, {"lm loss": None}, "lm loss step 2: no value"),
        (2, {"lm loss": "high"}, "lower-case hex digest"),
        (2, {"lm loss": True}, "got bool"),
        (2, {"lm loss": [1.0]}, "got list"),
    ],
)
def test_the_log_refuses_what_cannot_be_judged(
    tmp_path: Path, step: int, metrics: dict[str, float | None], message: str
) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.log(1, {"lm loss": 1.0})
    with pytest.raises(ValueError, match=message):
        writer.log(step, metrics)
    assert list(read_steps(tmp_path / "metrics.jsonl")) == [1]


def test_the_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.poll() == []
    writer = MetricsWriter(path)
    writer.log(1, {"lm loss": 1.5})
    assert tail.poll() == [(1, {"lm loss": 1.5})]
    with path.open("a") as stream:
        stream.write('{"step": 2, "metrics": {"lm')
    assert tail.poll() == []
    with path.open("a") as stream:
        stream.write(' loss": 2.5}}\n')
    assert tail.poll() == [(2, {"lm loss": 2.5})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1, "metrics": {"a": 1.0}}\n{"st', "torn"),
        ('{"step": 1, "metrics": {"a": 1.0}}\n{"step": 3, "metrics": {"a": 1.0}}\n', "follows"),
        ('{"step": 1, "metrics": {"a": 1.0}}\n{"step": 1, "metrics": {"a": 1.0}}\n', "follows"),
        ("hello\n", "not a metrics line"),
        ('{"step": 1, "metrics": {"a": [1.0]}}\n', r"not a metrics line: a \[1.0\]"),
        ('{"step": 1, "metrics": {"a": true}}\n', "not a metrics line: a True"),
        ('{"step": 1, "metrics": {"a": null}}\n', "not a metrics line: a None"),
        ('{"step": 1.5, "metrics": {"a": 1.0}}\n', "not a metrics line: step 1.5"),
        ('{"step": "x", "metrics": {"a": 1.0}}\n', "not a metrics line: step 'x'"),
        ("[1]\n", "not a metrics line"),
        ("\udcff\n", "metrics.jsonl: cannot be read"),
    ],
)
def test_a_bad_metrics_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        read_steps(tmp_path / "metrics.jsonl")
