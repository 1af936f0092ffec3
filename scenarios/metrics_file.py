"""The metrics of one run, one JSON line a step, written by rank 0 and read while it grows.

Floats are written by ``repr``. JSON has no NaN and no infinity: they are written as the strings
``"NaN"``, ``"Infinity"`` and ``"-Infinity"``; a skipped value is ``"nan"`` as in a golden.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scenarios.golden import HEX_DIGEST, MEASURED, SKIPPABLE, SKIPPED, Value
from scenarios.run_context import LogValue

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends the metrics of each step to a file and checks that steps count up by one."""

    def __init__(self, path: Path) -> None:
        self.last_step: int | None = None
        self._stream = path.open("x", encoding="utf-8", buffering=1)

    def log(self, step: int, metrics: Mapping[str, LogValue]) -> None:
        """Writes one step.

        Raises:
            ValueError: a step out of order, no metrics, or a value of a wrong type.
        """
        if step != (self.last_step or step - 1) + 1 or step < 1:
            raise ValueError(f"step {step} logged after step {self.last_step}")
        if not metrics:
            raise ValueError(f"step {step}: no metrics logged")
        line = {name: _encode(step, name, value) for name, value in metrics.items()}
        self._stream.write(json.dumps({"step": step, "metrics": line}, allow_nan=False) + "\n")
        self.last_step = step


class MetricsTail:
    """Follows a metrics file that another process is writing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def poll(self) -> list[tuple[int, dict[str, Value]]]:
        """The steps completely written since the last call."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        return [_decode(self._path, line) for line in data.decode().splitlines()]


def read_steps(path: Path) -> dict[int, dict[str, Value]]:
    """All steps of a finished run.

    Raises:
        ValueError: the file is missing, torn, or holds a step twice or out of order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: metrics file not found") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if text and not text.endswith("\n"):
        raise ValueError(f"{path}: the last line is torn")
    steps: dict[int, dict[str, Value]] = {}
    for line in text.splitlines():
        step, metrics = _decode(path, line)
        if steps and step != max(steps) + 1:
            raise ValueError(f"{path}: step {step} follows step {max(steps)}")
        steps[step] = metrics
    return steps


def _encode(step: int, name: str, value: LogValue) -> Value:
    where = f"{name} step {step}"
    if value is None:
        if name not in SKIPPABLE | MEASURED:
            allowed = ", ".join(sorted(SKIPPABLE))
            raise ValueError(f"{where}: no value, but only {allowed} may be skipped")
        return SKIPPED
    if isinstance(value, str):
        if HEX_DIGEST.fullmatch(value) is None:
            raise ValueError(f"{where}: expected a lower-case hex digest, got {value!r}")
        return value
    if type(value) not in (int, float):
        raise ValueError(f"{where}: expected a Python int or float, got {type(value).__name__}")
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode(path: Path, line: str) -> tuple[int, dict[str, Value]]:
    try:
        row: dict[str, Any] = json.loads(line)
        step, metrics = row["step"], row["metrics"]
        if type(step) is not int:
            raise TypeError(f"step {step!r}")
        for name, value in metrics.items():
            if type(value) not in (int, float, str):
                raise TypeError(f"{name} {value!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a metrics line: {error}: {line[:80]}") from None
    return step, {
        name: NOT_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in metrics.items()
    }
