"""Messages: one table, which the document shows, and nothing else gets through."""

import pickle
import re
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenarios.inference.messages import HEADER, MESSAGES, BadMessage, decode, encode

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "inference.md"
VALUES: dict[type, st.SearchStrategy[Any]] = {
    str: st.text(max_size=20),
    int: st.integers(-(2**63), 2**63 - 1),
    bool: st.booleans(),
    list: st.lists(st.integers(0, 100) | st.floats(allow_nan=False) | st.none(), max_size=4),
    dict: st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
}


@given(data=st.data())
def test_round_trip(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(MESSAGES)))
    fields = {name: data.draw(VALUES[t]) for name, t in MESSAGES[kind].fields.items()}
    assert decode(encode(kind, **fields)) == (kind, fields)


@given(frames=st.lists(st.binary(max_size=40), max_size=4))
def test_garbage_is_a_bad_message(frames: list[bytes]) -> None:
    with pytest.raises(BadMessage):
        decode(frames)


@given(data=st.data())
def test_a_changed_body_is_bad_or_another_message(data: st.DataObject) -> None:
    """Whatever happens to the bytes, what comes out has the types of the table."""
    header, body = encode("PARTIAL", id="a", first=3, tokens=[1, 2], log_probs=[-1.5, -2.5])
    changed = bytearray(body)
    changed[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(0, len(changed)))]
    try:
        kind, fields = decode([header, bytes(changed)])
    except BadMessage:
        return
    assert {name: type(value) for name, value in fields.items()} == MESSAGES[kind].fields


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "got 0 frames"),
        ([HEADER], "got 1 frames"),
        ([b"XYZ\x01", b""], "got header"),
        ([b"TBI\x02", b""], r"got version \[2\], expected 1"),
        ([HEADER, b"\xc1"], "no msgpack"),
        ([HEADER, pickle.dumps(["STOP", {}])], "no msgpack"),
        ([HEADER, msgpack.packb(msgpack.ExtType(5, b"x"))], "extension type 5"),
        ([HEADER, msgpack.packb(["DANCE", {}])], "unknown type 'DANCE'"),
        ([HEADER, msgpack.packb(["STOP", []])], "expected a map"),
        ([HEADER, msgpack.packb("STOP")], "no pair"),
        ([HEADER, msgpack.packb(["ABORT", {}])], "ABORT: got fields none, expected id"),
        ([HEADER, msgpack.packb(["ABORT", {"id": 5}])], "id: got int, expected str"),
        ([HEADER, msgpack.packb(["STOP", {"now": True}])], "STOP: got fields now, expected ask"),
        ([HEADER, b"\x91" * 5000], "no msgpack"),
    ],
)
def test_says_what_is_wrong(frames: list[bytes], message: str) -> None:
    with pytest.raises(BadMessage, match=message):
        decode(frames)


def test_sender_is_checked_too() -> None:
    with pytest.raises(BadMessage, match="unknown type"):
        encode("DANCE")
    with pytest.raises(BadMessage, match="first: got bool, expected int"):
        encode("PARTIAL", id="a", first=True, tokens=[], log_probs=[])


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Type -> (sender, fields) as the document's table has them."""
    found = re.findall(r"^\| `([A-Z]+)` \| (\w+) \| ([^|]*) \|", text, re.MULTILINE)
    return {kind: (sender, fields.strip()) for kind, sender, fields in found}


def expected_rows() -> dict[str, tuple[str, str]]:
    return {
        kind: (of.sender, ", ".join(f"`{name}`: {t.__name__}" for name, t in of.fields.items()))
        for kind, of in MESSAGES.items()
    }


def test_document_shows_the_table() -> None:
    assert rows(DOCUMENT.read_text()) == expected_rows()


def test_checker_catches_another_table() -> None:
    assert rows("| `ABORT` | client | `id`: int | x |") == {"ABORT": ("client", "`id`: int")}
