"""The messages between clients, coordinator and replicas: one table, one header, msgpack.

A message is two frames: the header, ``HEADER``, with the version of this table, and msgpack of
``[type, {field: value}]``. Only maps, lists, text, numbers, booleans and nil occur; nothing is ever
unpickled. A client numbers its questions by ``ask``, from 1 on; the answer bears the number.
docs/inference.md shows the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgpack

VERSION = 1
HEADER = b"TBI" + bytes([VERSION])
MAX_NBYTES = 16 * 2**20
"""A longer frame ends the connection that it comes from."""

Fields = dict[str, type]


@dataclass(frozen=True)
class Kind:
    """A type of message."""

    sender: Literal["client", "coordinator", "replica", "launcher"]
    meaning: str
    fields: Fields


MESSAGES: dict[str, Kind] = {
    "CONNECT": Kind("client", "asks for ACK", {"ask": int}),
    "SUBMIT": Kind("client", "a request to generate", {"request": dict, "stream": bool}),
    "ABORT": Kind("client", "forget a request", {"id": str}),
    "PAUSE": Kind("client", "RUNNING to PAUSED: no steps, requests stay", {"ask": int}),
    "UNPAUSE": Kind("client", "PAUSED to RUNNING", {"ask": int}),
    "SUSPEND": Kind("client", "PAUSED to SUSPENDED: KV caches are freed", {"ask": int}),
    "RESUME": Kind("client", "SUSPENDED to PAUSED", {"ask": int}),
    "STOP": Kind("client", "any state to STOPPED: requests fail, processes end", {"ask": int}),
    "STATUS": Kind("client", "asks for STATE", {"ask": int}),
    "DISCONNECT": Kind("client", "goodbye; its requests are forgotten", {}),
    "ACK": Kind("coordinator", "to a client: welcome", {"ask": int, "state": str, "model": dict}),
    "PARTIAL": Kind(
        "coordinator",
        "to a client: new tokens of a streamed request, from number `first` on",
        {"id": str, "first": int, "tokens": list, "log_probs": list},
    ),
    "REPLY": Kind(
        "coordinator",
        "to a client: a finished request",
        {
            "id": str,
            "tokens": list,
            "log_probs": list,
            "prompt_log_probs": list,
            "digests": list,
            "reason": str,
            "replica": int,
            "retried": bool,
        },
    ),
    "ERROR": Kind(
        "coordinator",
        "to whoever caused it: the request `id`, or the question `ask`, or neither (empty, 0)",
        {"id": str, "ask": int, "kind": str, "message": str},
    ),
    "STATE": Kind(
        "coordinator",
        "to a client: the answer to STATUS or to a command, when all replicas are there",
        {"ask": int, "state": str, "queued": int, "replicas": list},
    ),
    "PING": Kind("coordinator", "to a client with requests: is it there?", {}),
    "WORK": Kind("coordinator", "to a replica: a request", {"ticket": str, "request": dict}),
    "DROP": Kind("coordinator", "to a replica: forget a request", {"ticket": str}),
    "ENTER": Kind("coordinator", "to a replica: be in this state", {"state": str}),
    "REGISTER": Kind("replica", "here I am", {"secret": str, "replica": int}),
    "STEP": Kind(
        "replica",
        "what a step did: [ticket, first, token or nil, log-prob, digest, prompt log-probs, "
        "reason or nil] for each request",
        {"entries": list},
    ),
    "BEAT": Kind(
        "replica",
        "a sign of life",
        {"state": str, "blocks_in_use": int, "num_blocks": int, "num_requests": int},
    ),
    "LOST": Kind("launcher", "a replica has died", {"secret": str, "replica": int, "message": str}),
}


class BadMessage(ValueError):
    """Frames that are no message of this table."""


def encode(kind: str, /, **fields: Any) -> list[bytes]:
    """The frames of a message.

    Raises:
        BadMessage: a type or field that is not in the table.
    """
    _check(kind, fields)
    return [HEADER, msgpack.packb([kind, fields])]


def decode(frames: Sequence[bytes]) -> tuple[str, dict[str, Any]]:
    """Type and fields of a message.

    Raises:
        BadMessage: another number of frames, header or version, no msgpack, an unknown type, or
            fields that are missing, unknown or of another type.
    """
    if len(frames) != 2:
        raise BadMessage(f"got {len(frames)} frames, expected 2: header and body")
    header, body = frames
    if header[:3] != HEADER[:3]:
        raise BadMessage(f"got header {header[:8]!r}, expected {HEADER!r}")
    if header != HEADER:
        raise BadMessage(f"got version {list(header[3:])}, expected {VERSION}")
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True, ext_hook=_refuse_extension)
    except Exception as error:  # the library raises many kinds, also for bytes it cannot read
        raise BadMessage(f"no msgpack: {type(error).__name__}: {error}") from None
    if not (isinstance(message, list) and len(message) == 2 and isinstance(message[0], str)):
        raise BadMessage("got no pair of type and fields")
    kind, fields = message
    if not isinstance(fields, dict):
        raise BadMessage(f"{kind[:32]}: got {type(fields).__name__}, expected a map of fields")
    _check(kind, fields)
    return kind, fields


def _check(kind: str, fields: Mapping[str, Any]) -> None:
    if kind not in MESSAGES:
        raise BadMessage(f"unknown type {kind[:32]!r}")
    expected = MESSAGES[kind].fields
    if fields.keys() != expected.keys():
        got = ", ".join(sorted(map(str, fields)))[:200]
        raise BadMessage(f"{kind}: got fields {got or 'none'}, expected {', '.join(expected)}")
    for name, types in expected.items():
        value = fields[name]
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            wanted = getattr(types, "__name__", str(types))
            raise BadMessage(f"{kind}: {name}: got {type(value).__name__}, expected {wanted}")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise BadMessage(f"got extension type {code}")
