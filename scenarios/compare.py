"""The strict comparison: every value, every step, every bit; nothing is forgiven or rounded."""

import struct
from dataclasses import dataclass
from typing import Any

from scenarios.golden import Metrics, Value, is_finite


@dataclass(frozen=True)
class Difference:
    """One place where the actual metrics are not the golden ones.

    ``step`` is None when a whole metric is concerned; ``ulp`` is None unless both are floats.
    """

    metric: str
    step: int | None
    problem: str
    expected: Value | None = None
    actual: Value | None = None
    ulp: int | None = None
    ulp_format: str | None = None

    def __str__(self) -> str:
        place = self.metric if self.step is None else f"{self.metric} step {self.step}"
        if self.problem in ("missing metric", "extra metric"):
            return f"{place}: {self.problem}"
        text = f"{place}: {self.problem}: expected {_show(self.expected)}, got {_show(self.actual)}"
        return text if self.ulp is None else f"{text}, {self.ulp} ulp ({self.ulp_format})"

    def as_json(self) -> dict[str, Any]:
        """Plain values; expected and actual as ``repr`` text, since NaN and inf are not JSON."""
        return {
            "metric": self.metric,
            "step": self.step,
            "problem": self.problem,
            "expected": None if self.expected is None else _show(self.expected),
            "actual": None if self.actual is None else _show(self.actual),
            "ulp": self.ulp,
            "ulp_format": self.ulp_format,
        }


@dataclass(frozen=True)
class Comparison:
    """All differences, the first step first, and how many values were looked at."""

    differences: tuple[Difference, ...]
    num_values: int
    agreement: str = "all bits equal"
    """What can be said of values that do not differ."""

    @property
    def passed(self) -> bool:
        """True only if something was compared and nothing differs."""
        return self.num_values > 0 and not self.differences

    @property
    def summary(self) -> str:
        """One line: how many of how many differ."""
        if self.passed:
            return f"{self.num_values} values, {self.agreement}"
        if not self.num_values:
            return "nothing to compare: no metrics"
        return f"{len(self.differences)} of {self.num_values} differ"


def compare_strict(golden: Metrics, actual: Metrics) -> Comparison:
    """Walks golden and actual together.

    Args:
        golden: what is expected.
        actual: what a run logged.

    Returns:
        A comparison that passes only if both hold the same metrics and steps, at least one value,
        every value is finite (or a declared skip, see ``scenarios.golden``) and equal in all bits.
    """
    found: list[Difference] = []
    num_values = 0
    for name in sorted({*golden, *actual}):
        expected_values = golden[name].values if name in golden else {}
        actual_values = actual[name].values if name in actual else {}
        steps = sorted({*expected_values, *actual_values})
        num_values += len(steps)
        if not expected_values or not actual_values:
            num_values += not steps
            found.append(Difference(name, None, _absent(not actual_values, "metric")))
            continue
        for step in steps:
            if difference := _compare_value(
                name, step, expected_values.get(step), actual_values.get(step)
            ):
                found.append(difference)
    found.sort(key=lambda d: (-1 if d.step is None else d.step, d.metric))
    return Comparison(tuple(found), num_values)


def ulp_distance(a: float, b: float) -> tuple[int, str]:
    """How many representable numbers lie from a to b, and in which format.

    The format is fp32 when both are fp32 numbers, otherwise fp64. -0.0 and 0.0 are 1 apart.
    """
    if _is_fp32(a) and _is_fp32(b):
        return abs(_ordinal(a, "<f", "<i") - _ordinal(b, "<f", "<i")), "fp32"
    return abs(_ordinal(a, "<d", "<q") - _ordinal(b, "<d", "<q")), "fp64"


def same_bits(a: Value, b: Value) -> bool:
    """Equal type and equal bits; a NaN equals nothing here."""
    if isinstance(a, float) and isinstance(b, float):
        return a == a and struct.pack("<d", a) == struct.pack("<d", b)
    return type(a) is type(b) and a == b


def _compare_value(
    name: str, step: int, expected: Value | None, actual: Value | None
) -> Difference | None:
    if expected is None or actual is None:
        return Difference(name, step, _absent(actual is None, "step"), expected, actual)
    for value, whose in ((actual, "actual"), (expected, "golden")):
        if not is_finite(name, value):
            return Difference(name, step, f"{whose} value is not finite", expected, actual)
    if same_bits(expected, actual):
        return None
    if isinstance(expected, float) and isinstance(actual, float):
        ulp, ulp_format = ulp_distance(expected, actual)
        return Difference(name, step, "differs", expected, actual, ulp, ulp_format)
    return Difference(name, step, "differs", expected, actual)


def _absent(actual_is_missing: bool, what: str) -> str:
    return f"missing {what}" if actual_is_missing else f"extra {what}"


def _show(value: Value | None) -> str:
    if isinstance(value, str):
        return value if value.isalnum() else repr(value)
    return "nothing" if value is None else repr(value)


def _is_fp32(value: float) -> bool:
    try:
        return bool(struct.unpack("<f", struct.pack("<f", value))[0] == value)
    except OverflowError:
        return False


def _ordinal(value: float, float_format: str, int_format: str) -> int:
    bits: int = struct.unpack(int_format, struct.pack(float_format, value))[0]
    sign_bit = 1 << (8 * struct.calcsize(int_format) - 1)
    return bits if bits >= 0 else -1 - (bits + sign_bit)
