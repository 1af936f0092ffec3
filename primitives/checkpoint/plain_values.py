"""Python values as JSON and back, bit for bit and without pickle."""

import base64
import json
import math
import struct
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch

from primitives.checkpoint.shard_file import DTYPE_NAMES, DTYPES, tensor_bytes


def encode(value: Any, key: str) -> Any:
    """The JSON form of a value that is small: a setting, a counter, a state of a data loader.

    Args:
        value: None, bool, int, float, str, bytes, a dense tensor, a numpy array or scalar of
            numbers, or a list, tuple, dict, OrderedDict or Counter of those.
        key: where the value stands in the state, for the error message.

    Raises:
        ValueError: a type that does not come back from JSON as it was.

    Numerics: floats, tensors and arrays keep all bits, also of NaN, infinities and -0.0.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float64": struct.pack(">d", value).hex()}
    if type(value) is bytes:
        return {"bytes": _text(value)}
    if type(value) is list:
        return [encode(item, key) for item in value]
    if type(value) is tuple:
        return {"tuple": [encode(item, key) for item in value]}
    if type(value) is dict and all(type(name) is str for name in value):
        return {"dict": {name: encode(item, key) for name, item in value.items()}}
    if type(value) in MAPPINGS.values():
        pairs = [[encode(name, key), encode(item, key)] for name, item in value.items()]
        return {_NAMES[type(value)]: pairs}
    if type(value) is torch.Tensor and value.dtype in DTYPE_NAMES and not value.is_sparse:
        content = _text(tensor_bytes(value))
        return {"tensor": [DTYPE_NAMES[value.dtype], list(value.shape), content]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {kind: [value.dtype.str, list(value.shape), _text(value.tobytes())]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise ValueError(
        f"checkpoint key {key!r}: cannot store a {kind}; expected None, bool, int, float, str, "
        "bytes, a dense tensor, a numpy array or scalar, or a list, tuple, dict, OrderedDict or "
        "Counter of those"
    )


MAPPINGS: dict[str, type[Any]] = {"pairs": dict, "ordered": OrderedDict, "counter": Counter}
_NAMES = {kind: name for name, kind in MAPPINGS.items()}


def decode(encoded: Any) -> Any:
    """The value that ``encode`` was given."""
    if isinstance(encoded, list):
        return [decode(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = encoded.items()
    if kind == "float64":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind == "dict":
        return {name: decode(item) for name, item in content.items()}
    if kind in MAPPINGS:
        return MAPPINGS[kind]({decode(name): decode(item) for name, item in content})
    if kind == "tensor":
        dtype, shape, data = content
        tensor = torch.empty(shape, dtype=DTYPES[dtype])
        tensor_bytes(tensor)[:] = base64.b64decode(data)  # a contiguous CPU tensor's own memory
        return tensor
    if kind in ("array", "scalar"):
        dtype, shape, data = content
        array = np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
        return array if kind == "array" else array[()]
    raise ValueError(f"unknown kind of plain value {kind!r}")


def _text(content: bytes | memoryview) -> str:
    return base64.b64encode(content).decode("ascii")


def canonical_json(content: Any) -> bytes:
    """One spelling of a JSON document, so that equal content is equal bytes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode("ascii")
