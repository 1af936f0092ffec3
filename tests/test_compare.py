"""The strict comparison finds every single bit; Megatron's rules behave as Megatron's do."""

import copy
import math
import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from scenarios.compare import compare_strict, same_bits, ulp_distance
from scenarios.golden import Metric, Metrics, Value
from scenarios.megatron_rules import compare_megatron

FINITE = st.floats(allow_nan=False, allow_infinity=False)
STEPS = range(1, 5)


def metrics_of(**values: list[Value]) -> Metrics:
    return {
        name.replace("_", " "): Metric(1, len(v), 1, dict(enumerate(v, 1)))
        for name, v in values.items()
    }


GOLDEN = metrics_of(lm_loss=[4.0, 3.0, 2.0, 1.0], norm=[1.0, 1.0, 1.0, 1.0])


def test_equal_passes() -> None:
    comparison = compare_strict(GOLDEN, copy.deepcopy(GOLDEN))
    assert comparison.passed
    assert comparison.num_values == 8


@given(st.lists(FINITE, min_size=4, max_size=4), st.sampled_from(STEPS), st.integers(0, 63))
def test_every_single_bit_of_every_value_is_found(values: list[Value], step: int, bit: int) -> None:
    golden, actual = metrics_of(lm_loss=values), metrics_of(lm_loss=list(values))
    (pattern,) = struct.unpack("<Q", struct.pack("<d", values[step - 1]))
    (changed,) = struct.unpack("<d", struct.pack("<Q", pattern ^ (1 << bit)))
    actual["lm loss"].values[step] = changed
    comparison = compare_strict(golden, actual)
    assert [(d.metric, d.step) for d in comparison.differences] == [("lm loss", step)]
    assert comparison.summary == "1 of 4 differ"
    assert not comparison.passed


@given(st.integers(0, 2**40), st.integers(0, 39))
def test_every_single_bit_of_an_integer_is_found(value: int, bit: int) -> None:
    golden, actual = metrics_of(zeros=[value]), metrics_of(zeros=[value ^ (1 << bit)])
    assert not compare_strict(golden, actual).passed


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.pop("norm"), "norm: missing metric"),
        (lambda m: m.update(more=m["norm"]), "more: extra metric"),
        (lambda m: m["norm"].values.pop(2), "norm step 2: missing step: expected 1.0, got nothing"),
        (lambda m: m["norm"].values.pop(4), "norm step 4: missing step"),
        (lambda m: m["norm"].values.update({5: 1.0}), "norm step 5: extra step: expected nothing"),
        (lambda m: m["norm"].values.update({2: math.nan}), "not finite: expected 1.0, got nan"),
        (lambda m: m["norm"].values.update({2: math.inf}), "not finite: expected 1.0, got inf"),
        (lambda m: m["norm"].values.update({2: "nan"}), "not finite"),
        (lambda m: m["norm"].values.update({2: 1}), "differs: expected 1.0, got 1"),
        (lambda m: m["norm"].values.update({2: -1.0}), "differs: expected 1.0, got -1.0"),
    ],
)
def test_nothing_is_forgiven(change, told: str) -> None:  # type: ignore[no-untyped-def]
    actual = copy.deepcopy(GOLDEN)
    change(actual)
    comparison = compare_strict(GOLDEN, actual)
    assert not comparison.passed
    assert told in str(comparison.differences[0])


def test_nothing_compared_is_a_failure() -> None:
    assert not compare_strict({}, {}).passed
    empty = {"lm loss": Metric(1, 1, 1, {})}
    assert not compare_strict(empty, empty).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan"])
def test_a_loss_that_is_not_finite_never_passes_even_if_the_golden_has_it(value: Value) -> None:
    same = metrics_of(lm_loss=[value])
    assert not compare_strict(same, copy.deepcopy(same)).passed


def test_a_skipped_step_equals_only_a_skipped_step() -> None:
    skipped = {"num-zeros": Metric(1, 1, 1, {1: "nan"})}
    number = {"num-zeros": Metric(1, 1, 1, {1: 0})}
    not_a_number: Metrics = {"num-zeros": Metric(1, 1, 1, {1: math.nan})}
    assert compare_strict(skipped, copy.deepcopy(skipped)).passed
    for golden, actual in [(skipped, number), (number, skipped), (skipped, not_a_number)]:
        assert not compare_strict(golden, actual).passed


def test_zero_has_a_sign() -> None:
    comparison = compare_strict(metrics_of(a=[0.0]), metrics_of(a=[-0.0]))
    assert str(comparison.differences[0]) == (
        "a step 1: differs: expected 0.0, got -0.0, 1 ulp (fp32)"
    )


def test_the_first_step_comes_first() -> None:
    actual = copy.deepcopy(GOLDEN)
    actual["lm loss"].values[3] = 0.0
    actual["norm"].values[2] = 0.0
    told = [(d.step, d.metric) for d in compare_strict(GOLDEN, actual).differences]
    assert told == [(2, "norm"), (3, "lm loss")]


@given(FINITE, st.integers(-50, 50))
def test_ulp_counts_fp64_neighbours(value: float, distance: int) -> None:
    other = value
    for _ in range(abs(distance)):
        other = math.nextafter(other, math.copysign(math.inf, distance))
    assume(math.isfinite(other))
    ulp, ulp_format = ulp_distance(value, other)
    if ulp_format == "fp64":
        # Stepping over zero visits one number, but 0.0 and -0.0 are two bit patterns.
        assert ulp - abs(distance) in (0, 1)
        assert same_bits(value, other) == (ulp == 0)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 31))
def test_ulp_counts_fp32_neighbours_of_fp32_numbers(value: float, bit: int) -> None:
    (pattern,) = struct.unpack("<I", struct.pack("<f", value))
    (other,) = struct.unpack("<f", struct.pack("<I", pattern ^ (1 << bit)))
    assume(math.isfinite(other))
    ulp, ulp_format = ulp_distance(value, other)
    assert ulp_format == "fp32"
    assert ulp == (1 << bit) if bit < 31 else ulp == 2 * (pattern & 0x7FFFFFFF) + 1


def hundred(**changes: Value) -> Metrics:
    """Two metrics of 100 steps; ``s7=1e9`` changes the loss of step 7."""
    losses: dict[int, Value] = {step: 10.0 - step / 100 for step in range(1, 101)}
    losses |= {int(key[1:]): value for key, value in changes.items()}
    zeros: dict[int, Value] = dict.fromkeys(range(1, 101), 100)
    return {"lm loss": Metric(1, 100, 1, losses), "num-zeros": Metric(1, 100, 1, zeros)}


def judge(golden: Metrics, actual: Metrics, *names: str) -> dict[str, bool]:
    names = names or ("lm loss", "num-zeros")
    return {v.metric: v.passed for v in compare_megatron(golden, actual, names)}


def test_megatron_tolerates_five_percent() -> None:
    near, far = hundred(), hundred()
    for step in range(1, 101):
        near["lm loss"].values[step] = float(near["lm loss"].values[step]) * 1.04
        far["lm loss"].values[step] = float(far["lm loss"].values[step]) * 1.06
    assert judge(hundred(), near)["lm loss"]
    assert not judge(hundred(), far)["lm loss"]


def test_megatron_forgives_one_step_of_a_hundred_and_not_two() -> None:
    assert judge(hundred(), hundred(s7=1e9))["lm loss"]
    assert not judge(hundred(), hundred(s7=1e9, s8=1e9))["lm loss"]
    assert not compare_strict(hundred(), hundred(s7=1e9)).passed


def test_megatron_takes_nan_for_nan_and_ignores_what_is_extra() -> None:
    actual = hundred(s7="nan")
    actual["lm loss"].values[101] = 1e9
    assert judge(hundred(s7="nan"), actual)["lm loss"]
    assert not compare_strict(hundred(s7="nan"), actual).passed


def test_megatron_judges_one_median_of_the_time() -> None:
    def times(window_s: float) -> Metrics:
        inside = dict.fromkeys(range(30, 46), window_s)
        return {"iteration-time": Metric(1, 100, 1, dict.fromkeys(range(1, 101), 9.0) | inside)}

    assert judge(times(1.0), times(1.04), "iteration-time")["iteration-time"]
    assert not judge(times(1.0), times(1.06), "iteration-time")["iteration-time"]


@pytest.mark.parametrize("names", [(), ("lr",), ("mtp_1 loss",)])
def test_megatron_rules_need_a_metric_that_is_there(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"--metric|metric mtp_1 loss: not in the golden"):
        compare_megatron(hundred(), hundred(), names)
