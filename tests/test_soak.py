"""A sample of tests/soak.py (the whole: make soak), and its meter."""

import mmap
import threading
from pathlib import Path

import soak
from ranks import ProcessRanks


def test_ten_thousand_operations_leave_nothing_behind(tmp_path: Path) -> None:
    outputs = soak.soak(10_000, 4, tmp_path, timeout_s=240)
    assert "10000 operations on 4 ranks" in outputs[0]


def test_the_meter_sees_what_grows() -> None:
    before = soak.Footprint.measure()
    assert before.complaints(before) == []
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    nbytes = 2 * 1024 * soak.ALLOWED_GROWTH_KIB
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"\1" * nbytes)
    with Path("/proc/self/stat").open():
        complaints = soak.Footprint.measure().complaints(before)
    release.set()
    thread.join()
    memory.close()
    assert [text.split(":")[0] for text in complaints] == [
        "KiB of memory",
        "descriptors",
        "threads",
    ]


def leaky_worker(num_operations: str) -> None:
    """A rank that keeps the groups it should destroy."""
    soak.Program.leave_groups = lambda self: None  # type: ignore[method-assign]
    soak.worker(num_operations)


def test_groups_that_are_kept_are_a_leak(tmp_path: Path) -> None:
    started = ProcessRanks("test_soak:leaky_worker", 4, tmp_path, ("200",)).start()
    for code, output in started.wait(60):
        assert code == 1
        assert "segments" in output
