"""The benchmark: sizes and figures, inputs that find wrong results, and the command end to end."""

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from primitives.bench import BenchFailed, fused, measure
from primitives.bench import jobs as bench_jobs
from primitives.bench.case import (
    ALWAYS_IN_PLACE,
    DTYPES,
    NEVER_IN_PLACE,
    OPS,
    Case,
    bus_factor,
    bytes_moved,
    sizes,
)
from primitives.bench.figures import Placement, Row, Timing
from primitives.bench.jobs import Jobs
from primitives.bench.measure import Plan
from primitives.bench.payload import Array, expected_output, make_input, num_wrong
from scenarios.bench_tables import fused_head, fused_line, head, lines_of
from scenarios.cli import EXIT_MISMATCH, EXIT_PASS, EXIT_USAGE, main


def test_sizes_are_those_of_nccl_tests_in_whole_elements_of_every_rank() -> None:
    given = {"itemsize": 4, "world_size": 4}
    assert sizes(16, 256, factor=2, step=None, **given) == [16, 32, 64, 128, 256]
    assert sizes(100, 200, factor=None, step=50, **given) == [96, 144, 192]
    assert sizes(8, 64, factor=2, step=None, **given) == [16, 32, 64]  # 8 is less than an element
    for wrong in ({"first": 9, "last": 8}, {"first": 0, "last": 8}):
        with pytest.raises(ValueError, match="expected 0 < begin <= end, got"):
            sizes(**wrong, factor=2, step=None, **given)
    with pytest.raises(ValueError, match="-f 1"):
        sizes(8, 16, factor=1, step=None, **given)


def test_bandwidths_are_derived_as_in_nccl_tests() -> None:
    assert bus_factor("all_reduce", 4) == 1.5
    assert bus_factor("all_gather", 4) == bus_factor("reduce_scatter", 4) == 0.75
    assert bytes_moved("all_gather", 400, 4) == 400 + 4 * 400  # 4 shards read, 4 outputs written
    assert bytes_moved("reduce_scatter", 400, 4) == 4 * 400 + 400
    assert bytes_moved("all_reduce", 400, 4) == 8 * 400
    assert bytes_moved("broadcast", 400, 4) == 400 + 3 * 400


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small cases of every operation that moves data."""
    n = draw(st.integers(1, 8))
    dtype = draw(st.sampled_from(sorted(DTYPES.values())))
    reduce_op = draw(st.sampled_from(["sum", "prod", "min", "max"]))
    part = draw(st.integers(1, 40))
    probe = Case("all_reduce", 0, dtype, reduce_op, 0, n, False)
    nbytes = part * n * probe.itemsize
    op = draw(st.sampled_from([op for op in OPS if op != "barrier"]))
    return Case(op, nbytes, dtype, reduce_op, draw(st.integers(0, n - 1)), n, False)


def played(case: Case, rank: int) -> Array:
    """The operation on the inputs of all ranks, written without payload's formulas."""
    inputs = [make_input(case, r) for r in range(case.world_size)]
    part = case.numel // case.world_size
    if case.op == "all_gather":
        return np.concatenate(inputs)
    if case.op == "broadcast":
        return inputs[case.root]
    if case.op == "all_to_all":
        return np.concatenate([full[rank * part : (rank + 1) * part] for full in inputs])
    if case.dtype == "bfloat16":
        inputs = [(full.astype(np.uint32) << 16).view(np.float32) for full in inputs]
    combine = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}
    result = inputs[0]
    for full in inputs[1:]:
        result = combine[case.reduce_op](result, full)
    if case.dtype == "bfloat16":
        bits = result.view(np.uint32)
        assert not (bits & 0xFFFF).any(), "the reduction is not exact in bfloat16"
        result = (bits >> 16).astype(np.uint16)
    return result if case.op == "all_reduce" else result[rank * part : (rank + 1) * part]


@given(cases(), st.data())
@settings(max_examples=150, deadline=None)
def test_check_passes_right_results_and_counts_every_wrong_element(
    case: Case, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, case.world_size - 1))
    result = played(case, rank)
    assert num_wrong(case, rank, result) == 0
    broken = result.copy()
    where = data.draw(st.sets(st.integers(0, broken.size - 1), min_size=1, max_size=5))
    for index in where:
        broken.view(np.uint8)[index * broken.itemsize] ^= 1
    assert num_wrong(case, rank, broken) == len(where)
    assert num_wrong(case, rank, result[:-1]) > 0


def test_check_sees_blocks_that_were_swapped_or_never_written() -> None:
    case = Case("all_gather", 4 * 4 * 64, "float32", "sum", 0, 4, False)
    right = expected_output(case, 0)
    swapped = right.reshape(4, -1)[[1, 0, 2, 3]].reshape(-1)
    assert num_wrong(case, 0, swapped) > 64
    assert num_wrong(case, 0, np.zeros_like(right)) > 128


def test_command_measures_and_checks_everybody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scenarios.bench.Plan", functools.partial(Plan, block_s=0.002))
    output = tmp_path / "bench.json"
    arguments = ["bench", "all_gather", "all_reduce", "barrier", "-b", "1K", "-e", "4K", "-f", "4",
                 "-n", "2", "-w", "1", "--ranks", "2", "--against", "gloo,symmetric",
                 "-J", str(output)]  # fmt: skip
    assert main(arguments) == EXIT_PASS
    printed = capfd.readouterr().out
    assert "out-of-place" in printed
    assert "#wrong" in printed
    assert "gloo" in printed
    document = json.loads(output.read_text())
    assert [b["plan"]["op"] for b in document["benchmarks"]] == [
        "all_gather", "all_reduce", "barrier",
    ]  # fmt: skip
    assert document["num_wrong"] == 0
    gathered = document["benchmarks"][0]["rows"]
    assert [row["nbytes"] for row in gathered] == [1024, 4096]
    assert [row["count"] for row in gathered] == [128, 512]  # a rank's shard, float
    for row in gathered:
        for placement in (row["out_of_place"], row["in_place"]):
            timings = placement["timings"]
            assert set(timings) == {
                "primitives", "raw", "noop", "gloo", "symmetric", "copy", "copy_stream",
            }  # fmt: skip
            assert all(0 < t["time_us"] < 1e7 and t["num_blocks"] >= 1 for t in timings.values())
            assert placement["limit_us"] == min(
                timings[name]["time_us"] for name in ("copy", "copy_stream")
            )
            assert timings["primitives"]["wrong"] == timings["raw"]["wrong"] == 0
            assert timings["gloo"]["wrong"] == timings["symmetric"]["wrong"] == 0
            # The backend that does nothing is what a broken one looks like: the check sees it.
            assert timings["noop"]["wrong"] > 0
    reduced = document["benchmarks"][1]["rows"][0]
    assert reduced["out_of_place"] is None
    assert reduced["in_place"]["timings"]["noop"]["wrong"] > 0
    assert document["benchmarks"][2]["rows"][0]["nbytes"] == 0


def test_fused_compares_results_before_it_times_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [fused.Case("all_gather", numel=4000, num_tensors=7), fused.Case("reduce_scatter",
             "bfloat16", numel=4000, num_tensors=7)]  # fmt: skip
    rows = list(fused.measure(2, cases, num_rounds=2))
    assert [row.case for row in rows] == cases
    for row in rows:
        names = ["fsdp2 gloo", "fsdp2 primitives", "eager", "fused", "fused symmetric"]
        assert list(row.time_ms) == names
        assert row.ratio("fsdp2 gloo") == 1.0
        assert f"{row.time_ms['fused']:.2f}" in fused_line(row)
        assert all(name in fused_head(row)[1] for name in names)

    def wrong(case: fused.Case, groups: Any, device: torch.device) -> fused.Contestants:
        return {
            "a": fused.Contestant(lambda: [torch.zeros(3)]),
            "b": fused.Contestant(lambda: [torch.ones(3)]),
        }

    monkeypatch.setattr(fused, "all_gather", wrong)
    monkeypatch.setattr(fused, "timed", lambda contestant, device: 1.0)
    with pytest.raises(AssertionError, match="b: the results differ"):
        fused.run_case(cases[0], {}, torch.device("cpu"), num_rounds=1)


def row_of(wrong: int) -> Row:
    same = {"num_singles": 12, "num_blocks": 3, "foreign": 0.0}
    timing = Timing(time_us=4.0, p50_us=3.0, p99_us=9.0, wrong=wrong, **same)
    limit = Timing(time_us=1.0, p50_us=1.0, p99_us=2.0, wrong=None, **same)
    placement = Placement({"primitives": timing, "raw": timing, "noop": timing, "copy": limit})
    return Row(4096, 1024, None, placement)


def test_a_wrong_result_is_the_exit_code_and_stands_in_its_row(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "scenarios.bench.measure", lambda plans: ((plan, row_of(wrong=3)) for plan in plans)
    )
    assert main(["bench", "all_reduce", "--against", "none", "--json"]) == EXIT_MISMATCH
    assert json.loads(capfd.readouterr().out)["num_wrong"] == 6  # primitives and raw


def test_columns_derive_from_the_measured_time() -> None:
    plan = Plan("all_reduce", against=())
    (line,) = lines_of(plan, row_of(wrong=0))
    columns = line.split()
    assert columns[:5] == ["4096", "1024", "float", "sum", "-1"]
    assert columns[5:9] == ["-"] * 4  # all_reduce has no out-of-place form in c10d
    assert columns[9:13] == ["4.0", "1.02", "1.54", "0"]  # 4096 B / 4 us; times 1.5
    assert columns[13:19] == ["1.0", "25", "3.0", "9.0", "4.0", "4.0"]  # limit, %, p50..., noop
    assert "limit" in "\n".join(head(plan))


def test_an_absent_mpi_is_told_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_jobs, "MPI_DIR", tmp_path)
    jobs, absent = Plan("barrier", level="communicator", against=("mpich", "impi")).jobs()
    assert absent == ["mpich", "impi"]
    assert len(jobs) == 1
    assert "make bench-mpi" in measure.absent_message(absent)


def test_tensors_of_a_device_are_measured_like_arrays() -> None:
    """The contestants of --device cuda, on the device "cpu"."""
    with Jobs([(["primitives@cpu", "gloo@cpu", "symmetric@cpu", "copy@cpu"], "mp")], 2) as jobs:
        for op in OPS:
            for in_place in (False, True):
                if op in (NEVER_IN_PLACE if in_place else ALWAYS_IN_PLACE):
                    continue
                nbytes = 0 if op == "barrier" else 4096
                case = Case(op, nbytes, "bfloat16", "sum", 1, 2, in_place)
                question = {"do": "bind", "case": asdict(case), "check": True, "warmup": 1}
                for told in jobs.links[0].ask(question):
                    assert told["primitives@cpu"]["wrong"] == told["symmetric@cpu"]["wrong"] == 0
                    assert ("copy@cpu" in told) == (op != "barrier")
                block = {"do": "measure", "contestant": "primitives@cpu", "num_calls": 3}
                assert all(told["end"] > told["start"] for told in jobs.links[0].ask(block))


def test_what_is_measured_on_a_gpu() -> None:
    jobs, absent = Plan("all_gather", device="cuda", against=("nccl",)).jobs()
    assert jobs == [(["primitives@cuda", "nccl@cuda", "copy@cuda"], "mp")]
    assert absent == []
    for wrong in ({"against": ("gloo",)}, {"against": (), "level": "communicator"}):
        with pytest.raises(ValueError, match=r"against|--device cuda"):
            Plan("all_gather", device="cuda", **wrong)


def test_a_rank_that_ends_is_an_error_with_its_last_words() -> None:
    with pytest.raises(BenchFailed, match="unknown contestant 'nonsense'"):
        Jobs([(["nonsense"], "mp")], 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all_gather", "-b", "2K", "-e", "1K"], "expected 0 < begin <= end"),
        (["all_gather", "-b", "many"], "expected a size like"),
        (["all_gather", "-r", "4"], "expected a rank in [0, 4)"),
        (["all_gather", "--ranks", "99"], "expected 1 to"),
        (["all_reduce", "-o", "avg", "-d", "int32"], "avg is not defined"),
        (["all_reduce", "--against", "smoke"], "expected one of gloo"),
        (["all_reduce", "-i", "8", "-f", "2"], "one of -f and -i"),
        (["all_reduces"], "all_reduces"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == EXIT_USAGE
    said = capfd.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
