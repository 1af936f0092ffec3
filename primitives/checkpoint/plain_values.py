"""Plain Python values as JSON and back, bit for bit and without pickle."""

import base64
import json
import math
import struct
from typing import Any


def encode(value: Any, key: str) -> Any:
    """The JSON form of a plain value.

    Args:
        value: None, bool, int, float, str, bytes, or a list, tuple or str-keyed dict of those.
        key: where the value stands in the state, for the error message.

    Raises:
        ValueError: a type that does not come back from JSON as it was.

    Numerics: floats keep all 64 bits, also of NaN, infinities and -0.0.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float64": struct.pack(">d", value).hex()}
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if type(value) is list:
        return [encode(item, key) for item in value]
    if type(value) is tuple:
        return {"tuple": [encode(item, key) for item in value]}
    if type(value) is dict and all(type(name) is str for name in value):
        return {"dict": {name: encode(item, key) for name, item in value.items()}}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise ValueError(
        f"checkpoint key {key!r}: cannot store a {kind}; expected a tensor, None, bool, int, "
        "float, str, bytes, or a list, tuple or str-keyed dict of plain values"
    )


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
    raise ValueError(f"unknown kind of plain value {kind!r}")


def canonical_json(content: Any) -> bytes:
    """One spelling of a JSON document, so that equal content is equal bytes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode("ascii")
