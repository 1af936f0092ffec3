"""Golden files: recorded metric values that round-trip exactly, with their provenance.

Format of ``golden_values_canonical.json`` (one file per case, one entry per scale)::

    {"schema": 1,
     "scales": {"ci": {"provenance": {...},
                       "metrics": {"lm loss": {"start_step": 1, "end_step": 40, "step_interval": 1,
                                               "values": {"1": 6.9314718246, "2": "nan", ...}}}}}}

A value is an integer, a finite float (written by ``repr``, so it reads back as the same bits), a
lower-case hex digest, text (only in metrics called ``... generated_text``), or ``"nan"``: the
optimizer skipped this step and the metric has no value. Only the metrics in ``SKIPPABLE`` may say
so. Megatron's own golden files (the bare metrics, no schema) are read too.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

SCHEMA = 1
SKIPPED = "nan"
SKIPPABLE = frozenset({"num-zeros", "grad-norm"})
"""Metrics that have no value when an fp16 overflow skips the optimizer step."""
MEASURED = frozenset({"iteration-time", "mem-max-allocated-bytes"})
"""Seconds of a step, bytes of rank 0's largest resident set: never in a canonical golden."""

TEXT = "generated_text"
"""Ends the names of metrics whose values are text."""

Value = int | float | str
HEX_DIGEST = re.compile(r"[0-9a-f]{8,128}")


@dataclass(frozen=True)
class Metric:
    """The values of one metric by step."""

    start_step: int
    end_step: int
    step_interval: int
    values: dict[int, Value]


Metrics = dict[str, Metric]


@dataclass(frozen=True)
class Golden:
    """What was recorded at one scale, and how."""

    metrics: Metrics
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def arithmetic(self) -> str:
        """Of the run that was recorded; goldens that do not say are canonical."""
        return str(self.provenance.get("arithmetic", "canonical"))


def is_skipped(name: str, value: Value) -> bool:
    """Whether this value says, in a metric that may say so, that the step was skipped."""
    return name in SKIPPABLE and value == SKIPPED


def is_finite(name: str, value: Value) -> bool:
    """Whether a value may stand in a golden: a finite number, a digest, text or a declared skip."""
    if name.endswith(TEXT):
        return isinstance(value, str)
    if isinstance(value, str):
        return is_skipped(name, value) or HEX_DIGEST.fullmatch(value) is not None
    return isinstance(value, int) or math.isfinite(value)


def metrics_from_steps(steps: dict[int, dict[str, Value]], *, measured: bool = False) -> Metrics:
    """Turns values by step into values by metric; with those in ``MEASURED`` only if asked."""
    by_name: dict[str, dict[int, Value]] = {}
    for step in sorted(steps):
        for name, value in steps[step].items():
            if measured or name not in MEASURED:
                by_name.setdefault(name, {})[step] = value
    return {name: Metric(min(v), max(v), 1, v) for name, v in sorted(by_name.items())}


def first_steps(metrics: Metrics, num_steps: int) -> Metrics:
    """The metrics up to a step; one that has no value until then is left out."""
    cut = {}
    for name, metric in metrics.items():
        values = {step: value for step, value in metric.values.items() if step <= num_steps}
        if values:
            cut[name] = Metric(min(values), max(values), metric.step_interval, values)
    return cut


def without_measured(metrics: Metrics) -> Metrics:
    """The metrics that are computed and not measured."""
    return {name: metric for name, metric in metrics.items() if name not in MEASURED}


def write_golden(path: Path, scale: str, golden: Golden) -> None:
    """Writes one scale of a golden file; other scales in it are kept. Readers see old or new.

    Raises:
        ValueError: no metrics, a value that is not finite, or a present file that is not a golden.
    """
    if not golden.metrics:
        raise ValueError(f"{path}: nothing to record: the run logged no metrics")
    for name, metric in golden.metrics.items():
        for step, value in metric.values.items():
            if not is_finite(name, value):
                raise ValueError(f"{path}: {name} step {step} is {value!r}; it cannot be a golden")
    scales = read_golden_file(path) if path.exists() else {}
    scales[scale] = golden
    document = {
        "schema": SCHEMA,
        "scales": {
            key: {"provenance": entry.provenance, "metrics": _dump_metrics(entry.metrics)}
            for key, entry in sorted(scales.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file by one rename, so that a reader or a crash never meets half of it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
            os.fchmod(stream.fileno(), 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_golden_file(path: Path) -> dict[str, Golden]:
    """Reads a golden file.

    Returns:
        The recorded scales by name; a bare Megatron file is one entry under ``""``.

    Raises:
        ValueError: missing, corrupt or of another schema; the message names file and place.
    """
    document = _read_json(path)
    if not isinstance(document, dict):
        _refuse(path, "the file", "a JSON object", document)
    if "schema" not in document:
        return {"": Golden(_parse_metrics(path, document, "metrics", check=False))}
    if document["schema"] != SCHEMA or isinstance(document["schema"], bool):
        _refuse(path, "schema", str(SCHEMA), document["schema"])
    _check_keys(path, "the file", document, {"schema", "scales"})
    scales = document["scales"]
    if not isinstance(scales, dict) or not scales:
        _refuse(path, "scales", "an object with one entry per scale", scales)
    result = {}
    for scale, entry in scales.items():
        where = f"scales.{scale}"
        if not isinstance(entry, dict):
            _refuse(path, where, "an object", entry)
        _check_keys(path, where, entry, {"provenance", "metrics"})
        if not isinstance(entry["provenance"], dict):
            _refuse(path, f"{where}.provenance", "an object", entry["provenance"])
        metrics = _parse_metrics(path, entry["metrics"], f"{where}.metrics", check=True)
        result[scale] = Golden(metrics, entry["provenance"])
    return result


def read_golden(path: Path, scale: str) -> Golden:
    """Reads one scale of a golden file (see ``read_golden_file``).

    Raises:
        ValueError: as ``read_golden_file``, or this scale was never recorded.
    """
    scales = read_golden_file(path)
    if scale not in scales:
        have = ", ".join(scales) if "" not in scales else "a bare Megatron file"
        raise ValueError(f"{path}: no golden for scale {scale}; recorded: {have}")
    return scales[scale]


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: golden file not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    try:
        return json.loads(
            text,
            object_pairs_hook=_no_duplicates(path),
            parse_constant=lambda word: _refuse(path, "a value", "a finite number", word),
            parse_int=lambda digits: _integer(path, digits),
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: corrupt JSON at line {error.lineno} column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}: corrupt JSON: nested too deeply") from None


def _integer(path: Path, digits: str) -> int:
    # int() refuses thousands of digits with a message of its own, math.isfinite() some hundreds.
    return int(digits) if len(digits) < 20 else _refuse(path, "a value", "64 bits", digits)


def _no_duplicates(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{path}: key {twice!r} appears twice in one object")
        return result

    return build


def _parse_metrics(path: Path, document: Any, where: str, *, check: bool) -> Metrics:
    if not isinstance(document, dict) or not document:
        _refuse(path, where, "an object with at least one metric", document)
    metrics = {}
    for name, body in document.items():
        place = f"{where}.{name}"
        if not isinstance(body, dict):
            _refuse(path, place, "an object", body)
        _check_keys(path, place, body, {"start_step", "end_step", "step_interval", "values"})
        bounds = [body[key] for key in ("start_step", "end_step", "step_interval")]
        if not all(type(bound) is int and bound >= 0 for bound in bounds) or bounds[2] < 1:
            _refuse(path, place, "integer start_step, end_step and a step_interval >= 1", bounds)
        values = body["values"]
        if not isinstance(values, dict) or not values:
            _refuse(path, f"{place}.values", "an object with at least one step", values)
        parsed: dict[int, Value] = {}
        for step, value in values.items():
            if re.fullmatch(r"0|[1-9]\d{0,17}", step) is None:
                _refuse(path, f"{place}.values", "steps as plain decimal keys", step)
            if type(value) not in (int, float, str):
                _refuse(path, f"{place} step {step}", "a number or a string", value)
            if check and not is_finite(name, value):
                _refuse(path, f"{place} step {step}", "a finite number or a hex digest", value)
            parsed[int(step)] = value
        if check and list(parsed) != list(range(bounds[0], bounds[1] + 1, bounds[2])):
            steps = f"{min(parsed)}..{max(parsed)} ({len(parsed)} steps)"
            _refuse(path, f"{place}.values", "each step from {} to {} by {}".format(*bounds), steps)
        metrics[name] = Metric(bounds[0], bounds[1], bounds[2], parsed)
    return metrics


def _dump_metrics(metrics: Metrics) -> dict[str, Any]:
    return {
        name: {
            "start_step": metric.start_step,
            "end_step": metric.end_step,
            "step_interval": metric.step_interval,
            "values": {str(step): value for step, value in metric.values.items()},
        }
        for name, metric in metrics.items()
    }


def _check_keys(path: Path, where: str, body: dict[str, Any], expected: set[str]) -> None:
    if set(body) != expected:
        _refuse(path, f"{where}: keys", ", ".join(sorted(expected)), ", ".join(sorted(body)))


def _refuse(path: Path, where: str, expected: str, got: object) -> NoReturn:
    shown = repr(got) if not isinstance(got, str) else got
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise ValueError(f"{path}: {where}: expected {expected}, got {shown}")
