"""What the benchmark writes: quantiles of single calls, CSV, pictures; errors before any of it."""

import copy
import csv
import functools
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from primitives.bench.figures import MAX_FOREIGN, Block, timing_of
from primitives.bench.measure import Plan
from primitives.bench.rank import MAX_SINGLES
from scenarios.bench_csv import COLUMNS, csv_text
from scenarios.bench_plot import curves, plot_bytes
from scenarios.cli import EXIT_PASS, EXIT_USAGE, main


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=300))
def test_quantiles_are_calls_that_took_so_long(singles_us: list[float]) -> None:
    halves = np.array_split(np.array(singles_us), 2)
    timing = timing_of([Block(0.0, 1e-6, half) for half in halves], 2, wrong=None)
    assert timing.num_singles == len(singles_us)
    for quantile, found in ((0.5, timing.p50_us), (0.99, timing.p99_us)):
        assert found in singles_us
        assert sum(took <= found for took in singles_us) >= quantile * len(singles_us)
        assert sum(took < found for took in singles_us) < quantile * len(singles_us)


def test_a_disturbed_block_does_not_count_unless_there_is_no_other() -> None:
    clean = [Block(0.0, 4e-6, np.arange(1.0, 101.0)), Block(0.01, 6e-6, np.arange(101.0, 201.0))]
    disturbed = Block(2 * MAX_FOREIGN, 1.0, np.full(100, 1e6))
    timing = timing_of([disturbed, *clean], 2, wrong=0)
    assert (timing.time_us, timing.p50_us, timing.p99_us) == (5.0, 100.0, 198.0)
    assert (timing.num_blocks, timing.num_singles) == (2, 200)
    assert timing_of([disturbed], 2, wrong=0).p99_us == 1e6


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run's files."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["bench", "all_gather", "all_reduce", "barrier", "-b", "1K", "-e", "4K", "-f", "4",
                 "-n", "1", "-w", "0", "--ranks", "2", "--against", "gloo", "-d", "bfloat16",
                 "-J", str(folder / "run.json"), "--csv", str(folder / "run.csv"),
                 "--plot", str(folder / "run.svg")]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scenarios.bench.Plan", functools.partial(Plan, block_s=0.002))
        assert main(arguments) == EXIT_PASS
    return folder


@pytest.fixture(scope="module")
def document(written: Path) -> dict[str, Any]:
    """Its JSON."""
    found: dict[str, Any] = json.loads((written / "run.json").read_text())
    return found


def difference(document: dict[str, Any], text: str) -> str | None:
    """The first figure of the JSON document that its CSV does not have."""
    lines = {
        (line["op"], int(line["nbytes"]), line["placement"], line["contestant"]): line
        for line in csv.DictReader(text.splitlines())
    }
    for benchmark in document["benchmarks"]:
        for row in benchmark["rows"]:
            for where in ("out_of_place", "in_place"):
                for name, timing in row[where]["timings"].items() if row[where] else ():
                    key = (benchmark["plan"]["op"], row["nbytes"], where, name)
                    if key not in lines:
                        return f"{key}: no line"
                    line = lines.pop(key)
                    for column, value in timing.items():
                        if line[column] != ("" if value is None else str(value)):
                            return f"{key}: {column}: {line[column]!r}, not {value!r}"
                    limit_us = row[where]["limit_us"]
                    if name != "noop" and limit_us and float(line["limit_us"]) != limit_us:
                        return f"{key}: limit_us: {line['limit_us']}, not {limit_us}"
    return f"more lines: {list(lines)}" if lines else None


def test_every_contestant_has_quantiles(document: dict[str, Any]) -> None:
    for benchmark in document["benchmarks"]:
        for row in benchmark["rows"]:
            for placement in filter(None, (row["out_of_place"], row["in_place"])):
                assert {"primitives", "raw", "noop", "gloo"} <= set(placement["timings"])
                for timing in placement["timings"].values():
                    assert 0 < timing["p50_us"] <= timing["p99_us"]
                    of_a_rank = timing["num_singles"] / timing["num_blocks"] / 2
                    assert 1 <= of_a_rank <= MAX_SINGLES


def test_csv_reads_back_as_the_numbers_of_the_json(written: Path, document: dict[str, Any]) -> None:
    text = (written / "run.csv").read_text()
    assert text == csv_text(document["benchmarks"])
    assert tuple(text.splitlines()[0].split(",")) == COLUMNS
    assert difference(document, text) is None
    for line in csv.DictReader(text.splitlines()):
        assert line["reduce_op"] == ("sum" if line["op"] == "all_reduce" else "none")
        if line["contestant"] == "noop":
            assert line["busbw_gb_s"] == line["limit_percent"] == ""
        elif line["op"] == "all_reduce":  # of 2 ranks: busbw = algbw
            algbw = int(line["nbytes"]) / float(line["time_us"]) / 1e3
            assert float(line["algbw_gb_s"]) == float(line["busbw_gb_s"]) == algbw
            share = 100 * float(line["limit_us"]) / float(line["time_us"])
            assert float(line["limit_percent"]) == share


def test_a_csv_that_lacks_or_changes_something_differs(document: dict[str, Any]) -> None:
    text = csv_text(document["benchmarks"])
    lines = text.splitlines()
    assert "no line" in (difference(document, "\n".join(lines[:-1])) or "")
    timing = document["benchmarks"][0]["rows"][0]["in_place"]["timings"]["gloo"]
    changed = text.replace(str(timing["p99_us"]), str(timing["p99_us"] + 0.001))
    assert "p99_us" in (difference(document, changed) or "")


def test_a_contestant_that_refuses_has_a_line_with_its_error(document: dict[str, Any]) -> None:
    said = 'RuntimeError: "avg", which gloo\nhas not'
    placement = {"timings": {}, "errors": {"gloo": said}, "limit_us": None}
    row = {"nbytes": 8, "count": 2, "out_of_place": None, "in_place": placement}
    text = csv_text([{"plan": document["benchmarks"][1]["plan"], "rows": [row]}])
    (line,) = csv.DictReader(text.splitlines(keepends=True))
    assert (line["contestant"], line["error"], line["time_us"]) == ("gloo", said, "")


def test_curves_are_the_bandwidths_of_the_table(document: dict[str, Any]) -> None:
    gathered = document["benchmarks"][0]
    drawn = curves(gathered)
    assert list(drawn) == ["primitives", "raw", "gloo", "limit"]
    for name, line in drawn.items():
        for (nbytes, busbw), row in zip(line, gathered["rows"], strict=True):
            placement = row["out_of_place"]
            limit_us = placement["limit_us"]
            time_us = limit_us if name == "limit" else placement["timings"][name]["time_us"]
            assert nbytes == row["nbytes"]
            assert busbw == pytest.approx(nbytes / time_us / 2e3)  # 2 ranks: half crosses


def words_of(svg: bytes) -> set[str]:
    """Every text of a picture; an error if it is no SVG."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return {"".join(text.itertext()).strip() for text in root.iter(f"{root.tag[:-3]}text")}


def test_svg_names_contestants_and_operations(written: Path, document: dict[str, Any]) -> None:
    words = words_of((written / "run.svg").read_bytes())
    titles = {"all_gather, bfloat16, out of place", "all_reduce, bfloat16, in place"}
    assert titles | {"primitives", "raw", "gloo", "limit", "size (bytes)", "1K"} <= words
    assert not {"noop", "copy", "copy_stream"} & words
    assert not any("barrier" in word for word in words)
    without = copy.deepcopy(document)
    for row in without["benchmarks"].pop(0)["rows"] + without["benchmarks"][0]["rows"]:
        del row["in_place"]["timings"]["gloo"]
    assert "gloo" not in words_of(plot_bytes(without, ".svg"))


def test_png_and_html_are_what_they_are_called(document: dict[str, Any]) -> None:
    png = plot_bytes(document, ".png")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    page = plot_bytes(document, ".html").decode()
    assert page.startswith("<!DOCTYPE html>")
    assert "primitives" in words_of(page[page.index("<svg") :].encode())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all_reduce", "--plot", "out.pdf"], "ends in .png, .svg, .html, got 'out.pdf'"),
        (["all_reduce", "--plot", "plot"], "ends in .png, .svg, .html, got 'plot'"),
        (["barrier", "gemm", "--plot", "out.png"], "a collective that moves bytes between ranks"),
        (["all_reduce", "--ranks", "1", "--plot", "out.png"], "moves bytes between ranks"),
        (["gemm", "--csv", "out.csv"], "--csv: expected a collective, got gemm"),
        (["all_reduce", "--csv", "nowhere/out.csv"], "existing folder, got 'nowhere/out.csv'"),
        (["all_reduce", "-J", "nowhere/out.json"], "existing folder, got 'nowhere/out.json'"),
    ],
)
def test_what_cannot_be_written_is_told_before_measuring(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scenarios.bench.measure", lambda plans: pytest.fail("it measures"))
    assert main(["bench", *arguments]) == EXIT_USAGE
    said = capfd.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_told_before_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("scenarios.bench.measure", lambda plans: pytest.fail("it measures"))
    assert main(["bench", "all_reduce", "--plot", str(tmp_path / "a.png")]) == EXIT_USAGE
    said = capfd.readouterr().err
    assert "--plot needs matplotlib" in said
    assert "pip install 'matplotlib~=3.11'" in said
    assert len(said.splitlines()) == 1
