"""Megatron's token files: what is written is read back, and what was altered is refused."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarios.data import make_dataset
from scenarios.data.index_format import DTYPES
from scenarios.data.indexed import IndexedDataset, IndexedDatasetWriter, build
from scenarios.schema import load_scenario

TEXT = "To be, or not\nto be.\n\n\nThat is the question:\n  \nWhether 'tis nobler\n"


def make_files(folder: Path, text: str = TEXT) -> Path:
    (folder / "play.txt").write_text(text)
    build([folder / "play.txt"], "bytes", folder / "play")
    return folder / "play"


@given(
    dtype=st.sampled_from([*DTYPES.values()]),
    documents=st.lists(st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=4), max_size=6),
)
@settings(max_examples=60)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, dtype: Any, documents: list[list[list[int]]]
) -> None:
    prefix = tmp_path_factory.mktemp("data") / "p"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequences in documents:
            tokens = [token for sequence in sequences for token in sequence]
            writer.add_document(tokens, [len(sequence) for sequence in sequences])
    files = IndexedDataset(prefix)
    assert files.num_documents == len(documents)
    for number, sequences in enumerate(documents):
        tokens = [token for sequence in sequences for token in sequence]
        assert files.read(number).dtype == dtype
        assert files.read(number).tolist() == tokens
        assert files.read(number, 1, 3).tolist() == tokens[1:3]
        assert files.document_lengths[number] == len(tokens)
        assert files.sequence_lengths(number) == [len(sequence) for sequence in sequences]
    largest = max((t for doc in documents for seq in doc for t in seq), default=0)
    assert files.vocab_size == largest + 1


def test_bytes_of_the_format(tmp_path: Path) -> None:
    """Two documents, three sequences, laid out by hand from the format's description."""
    with IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([5, 6, 7], [1, 2])
        writer.add_document([8])
    assert (tmp_path / "p.bin").read_bytes() == bytes([5, 0, 6, 0, 7, 0, 8, 0])
    expected = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08"
    expected += (3).to_bytes(8, "little") + (3).to_bytes(8, "little")
    expected += b"".join(n.to_bytes(4, "little") for n in (1, 2, 1))
    expected += b"".join(n.to_bytes(8, "little") for n in (0, 2, 6))
    expected += b"".join(n.to_bytes(8, "little") for n in (0, 2, 3))
    assert (tmp_path / "p.idx").read_bytes() == expected


def test_every_altered_byte_is_found(tmp_path: Path) -> None:
    prefix = make_files(tmp_path)
    for suffix in ("idx", "bin"):
        path = prefix.with_suffix(f".{suffix}")
        good = path.read_bytes()
        for place in range(len(good)):
            bad = bytearray(good)
            bad[place] ^= 1 << place % 8
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=f"play.{suffix}: corrupt"):
                IndexedDataset(prefix).verify()
        path.write_bytes(good)
    IndexedDataset(prefix).verify()


def test_without_checksums_an_altered_structure_is_still_found(tmp_path: Path) -> None:
    prefix = make_files(tmp_path)
    prefix.with_suffix(".json").unlink()
    path = prefix.with_suffix(".idx")
    good = path.read_bytes()
    document_indices_at = 34 + 12 * 3
    for place in range(document_indices_at):
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=r"play\.idx: corrupt"):
                IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_every_truncation_is_found(tmp_path: Path, suffix: str) -> None:
    prefix = make_files(tmp_path)
    prefix.with_suffix(".json").unlink()
    path = prefix.with_suffix(f".{suffix}")
    good = path.read_bytes()
    for end in range(len(good)):
        path.write_bytes(good[:end])
        with pytest.raises(ValueError, match="corrupt"):
            IndexedDataset(prefix)
    path.unlink()
    with pytest.raises(ValueError, match=f"play.{suffix}: cannot be read: No such file"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"vocab_size": 3}', b"\xff"])
def test_broken_facts(tmp_path: Path, content: bytes) -> None:
    prefix = make_files(tmp_path)
    prefix.with_suffix(".json").write_bytes(content)
    with pytest.raises(ValueError, match=r"play\.json: corrupt"):
        IndexedDataset(prefix)


def test_build_from_text(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text('{"text": "\u00e9\\n\\nx"}\n\n{"text": " "}\n')
    facts = build(
        [tmp_path / "a.txt", tmp_path / "b.jsonl"],
        "bytes",
        tmp_path / "p",
        progress=lambda done, total: calls.append((done, total)),
    )
    files = IndexedDataset(tmp_path / "p")
    texts = [bytes(files.read(i)[:-1].tolist()).decode() for i in range(files.num_documents)]
    assert texts == [
        "To be, or not\nto be.\n",
        "That is the question:\n",
        "Whether 'tis nobler\n",
        "\u00e9\n\nx",
    ]
    assert all(files.read(i)[-1] == facts.eod == 256 for i in range(4))
    assert (facts.num_documents, facts.num_tokens) == (4, int(files.document_lengths.sum()))
    total = sum((tmp_path / name).stat().st_size for name in ("a.txt", "b.jsonl"))
    assert calls[-1] == (total, total)
    assert json.loads((tmp_path / "p.json").read_text())["sha256_bin"] == facts.sha256_bin != ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.txt", "b.jsonl", "p.bin", "p.idx", "p.json")
    ]


def test_build_with_a_tokenizer_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "to": 1, "be": 2, "not": 9}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("to be not\n\nto\n")
    facts = build([tmp_path / "a.txt"], str(tmp_path / "tokenizer.json"), tmp_path / "p")
    files = IndexedDataset(tmp_path / "p")
    assert facts.eod == 10, "a tokenizer without an end of text gets one more id"
    assert [files.read(i).tolist() for i in range(2)] == [[1, 2, 9, 10], [1, 10]]
    assert load_scenario("S1", scale="ci", data=tmp_path / "p").model.vocab_size == 16


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "got no text"),
        ("a.txt", b"\n  \n", "got no text"),
        ("a.txt", b"fine\n\n\xff\xfe", "a.txt line 3: got bytes that are not UTF-8 at column 1"),
        ("a.jsonl", b'{"text": "a"}\n{', "a.jsonl line 2: not JSON"),
        ("a.jsonl", b'{"txt": "a"}', "expected an object with a 'text'"),
        ("a.jsonl", b"[1]", "expected an object with a 'text'"),
    ],
)
def test_build_refuses_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        build([tmp_path / name], "bytes", tmp_path / "p")
    assert expected in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_build_missing_things(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"nope.txt: no such file"):
        build([tmp_path / "nope.txt"], "bytes", tmp_path / "p")
    with pytest.raises(ValueError, match=r"tokenizer .*nope.json: no such file"):
        build([tmp_path / "a.txt"], str(tmp_path / "nope.json"), tmp_path / "p")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json: not a tokenizer.json"):
        build([tmp_path / "a.txt"], str(tmp_path / "bad.json"), tmp_path / "p")
    with pytest.raises(ValueError, match="cannot be written: No such file"):
        build([tmp_path / "a.txt"], "bytes", tmp_path / "nowhere" / "p")


def test_a_failed_rebuild_keeps_the_old_files(tmp_path: Path) -> None:
    prefix = make_files(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"x\n\n\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        build([tmp_path / "bad.txt"], "bytes", prefix)
    IndexedDataset(prefix).verify()


@pytest.mark.parametrize("num_documents", [1, 100])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, num_documents: int) -> None:
    """The limit bites at the flush of the last part, or while documents are being added."""
    (tmp_path / "a.txt").write_text(("x" * 5000 + "\n\n") * num_documents)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ValueError, match="cannot be written: File too large"):
            build([tmp_path / "a.txt"], "bytes", tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_writer_refuses(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        with pytest.raises(ValueError, match="expected ids that fit uint16"):
            writer.add_document([70000])
        with pytest.raises(ValueError, match="expected equal numbers"):
            writer.add_document([1, 2], [1])
    assert IndexedDataset(tmp_path / "p").num_documents == 0
    with pytest.raises(ValueError, match="token type: got float32"):
        IndexedDatasetWriter(tmp_path / "q", np.float32)  # type: ignore[arg-type]


def test_scenario_follows_the_data(tmp_path: Path) -> None:
    prefix = make_files(tmp_path)
    scenario = load_scenario("S1", scale="ci", data=prefix)
    assert scenario.model.vocab_size == 264, "257 ids padded to a multiple of 8"
    assert scenario.data.prefix == prefix
    batch = make_dataset(scenario).batch(0, 2)
    ids = {*b"".join(part.encode() for part in TEXT.split("\n\n")), 256}
    assert set(batch.tokens.ravel().tolist()) <= ids
    prefix.with_suffix(".json").unlink()
    assert load_scenario("S1", scale="ci", data=prefix).model.vocab_size == 264
    with pytest.raises(ValueError, match=r"nope.idx: cannot be read"):
        load_scenario("S1", scale="ci", data=Path(os.devnull).parent / "nope")
