"""What the always-on part costs a call: call site, flight record, publication of both.

``python -m primitives.bench.recorder``: a group of one rank, whose barrier does nothing; blocks
with and without recording take turns. Prints the medians and the difference, in ns a call.
"""

import statistics
import time
from datetime import timedelta
from typing import Any

LIMIT_NS = 300.0


def measure(num_blocks: int = 40, num_calls: int = 5000) -> tuple[float, float]:
    """Median ns of one call without and with recording.

    Args:
        num_blocks: how many of each kind.
        num_calls: calls of one block.
    """
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    from primitives import _C

    options = _C.Backend.Options(timedelta(seconds=10))
    backend = _C.Backend(HashStore(), 0, 1, options)
    times: dict[bool, list[float]] = {False: [], True: []}
    try:
        for _ in range(num_blocks):
            for on in times:
                _C.set_recording(on)
                times[on].append(_block(backend, num_calls))
    finally:
        _C.set_recording(True)
        backend.shutdown()
    return statistics.median(times[False]), statistics.median(times[True])


def _block(backend: Any, num_calls: int) -> float:
    from torch.distributed import BarrierOptions  # type: ignore[attr-defined]

    options = BarrierOptions()
    options.asyncOp = False  # everything on this thread
    start = time.thread_time_ns()  # of this thread: other programs may run beside it
    for _ in range(num_calls):
        backend.barrier(options)
    return (time.thread_time_ns() - start) / num_calls


def main() -> None:
    """Prints both sides."""
    without, recorded = measure()
    print(f"barrier of one rank, ns a call: without recording {without:.0f}, with {recorded:.0f}")
    print(f"recording costs {recorded - without:.0f} ns a call (limit {LIMIT_NS:.0f})")


if __name__ == "__main__":
    main()
