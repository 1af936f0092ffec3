"""One rank of a benchmark: ``python -m primitives.bench.rank LINK STORE CONTESTANT...``.

The rank connects to the measuring process's socket LINK and does what each line asks: bind a case,
run a block of calls. A block starts after a barrier of the job; its times are CLOCK_MONOTONIC,
which all processes of a host share.
"""

import gc
import itertools
import json
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

from primitives.bench.case import Case
from primitives.bench.contestants import Bound, C10d, Contestant, Copy, Mpi, Raw, Run
from primitives.bench.payload import make_input, num_wrong

MPIS = ("openmpi", "mpich", "impi")
TIMEOUT_S = 100.0
MAX_SINGLES = 200
"""Calls timed one by one behind a block, at most; else a quarter of the block's."""


class Job:
    """The contestants of this job and their common barrier."""

    def __init__(self, store_path: str, names: list[str]) -> None:
        self.contestants: dict[str, Contestant] = {}
        self.bound: dict[str, Bound] = {}
        self.sync: Run
        if names[0] in MPIS:
            mpi = Mpi()
            self.rank, self.world_size = mpi.comm.rank, mpi.comm.size
            self.contestants[names[0]] = mpi
            self.sync = mpi.comm.Barrier
        else:
            self._join(store_path, names)

    def _join(self, store_path: str, names: list[str]) -> None:
        import torch
        import torch.distributed as dist
        from torch._C._distributed_c10d import FileStore, PrefixStore

        import primitives.backend
        from primitives.rendezvous import rank_info

        torch.set_num_threads(1)
        info = rank_info()
        if info is None:
            raise ValueError("expected to be started by torchrun or mpirun, or with RANK set")
        self.rank, self.world_size = info.rank, info.world_size
        primitives.backend.register()
        store = FileStore(store_path, self.world_size)
        dist.init_process_group(
            "primitives", store=store, rank=self.rank, world_size=self.world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )  # fmt: skip
        for name in names:
            match name:
                case "primitives" | "gloo":
                    self.contestants[name] = C10d(name)
                case "raw":
                    self.contestants[name] = Raw(
                        PrefixStore(name, store), self.rank, self.world_size
                    )
                case "symmetric" if "primitives" in names:
                    self.contestants[name] = C10d("primitives", symmetric=True)
                case "symmetric":
                    self.contestants[name] = Raw(
                        PrefixStore(name, store), self.rank, self.world_size, symmetric=True
                    )
                case "noop":
                    self.contestants[name] = C10d("fake")
                case "copy" | "copy_stream":
                    self.contestants[name] = Copy(stream=name == "copy_stream")
                case _ if "@" in name:
                    from primitives.bench.device_contestants import contestant_on

                    self.contestants[name] = contestant_on(device_of(name), name.split("@")[0])
                case _:
                    raise ValueError(f"unknown contestant {name!r}")
        self.sync = dist.barrier

    def bind(self, case: Case, check: bool, warmup: int) -> dict[str, Any]:
        """For each contestant that can: seconds a call takes, and how many elements are wrong."""
        self.bound.clear()
        gc.collect()
        told: dict[str, Any] = {}
        for name, contestant in self.contestants.items():
            try:
                bound = contestant.bind(case, self.rank)
                if bound is None:
                    continue
                self.sync()
                wrong = self._check(case, bound) if check and "copy" not in name else 0
                start = time.monotonic()
                for _ in range(max(1, warmup)):
                    bound.run()
                bound.finish()
                seconds = (time.monotonic() - start) / max(1, warmup)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                # Refused alike on every rank, as gloo refuses an average.
                told[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
                continue
            self.bound[name] = bound
            told[name] = {"seconds": seconds, "wrong": wrong}
        return told

    def _check(self, case: Case, bound: Bound) -> int:
        mine = make_input(case, self.rank)
        if case.op != "broadcast" or self.rank == case.root:
            bound.send[:] = mine
        bound.load()
        bound.run()
        bound.fetch()
        wrong = num_wrong(case, self.rank, bound.recv)
        bound.send[:] = 0
        bound.recv[:] = 0
        return wrong

    def measure(self, name: str, num_calls: int) -> dict[str, Any]:
        """One block, and behind it calls with a look at the clock after each.

        Returns:
            start, end: of the block, in seconds.
            singles_us: how long each of the other calls took on this rank.
            cpu: seconds this process used in all.
        """
        cpu_start = time.process_time()  # what is not the ranks' is foreign: all of theirs counts
        run, finish = self.bound[name].run, self.bound[name].finish
        for _ in range(1 + 2 * num_calls):  # the scheduler takes 0.1 s to settle the ranks
            run()
        finish()
        self.sync()
        start = time.monotonic()
        for _ in range(num_calls):
            run()
        finish()
        end = time.monotonic()
        self.sync()
        stamps_ns = [time.monotonic_ns()]
        for _ in range(max(1, min(MAX_SINGLES, num_calls // 4))):
            run()
            finish()
            stamps_ns.append(time.monotonic_ns())
        self.sync()
        cpu = time.process_time() - cpu_start
        singles_us = [(after - before) / 1e3 for before, after in itertools.pairwise(stamps_ns)]
        return {"start": start, "end": end, "singles_us": singles_us, "cpu": cpu}


def device_of(name: str) -> Any:
    """Of a contestant like ``nccl@cuda``: this rank's device, which several may share."""
    import torch

    kind = name.split("@")[1]
    if kind != "cuda":
        return torch.device(kind)
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def main(link: str, store_path: str, names: list[str]) -> None:
    """Serves the measuring process until it closes the link."""
    channel = socket.socket(socket.AF_UNIX)
    channel.connect(link)
    job = Job(store_path, names)
    gc.disable()
    with channel, channel.makefile("rw") as lines:
        print(json.dumps({"contestants": names, "rank": job.rank}), file=lines, flush=True)
        for line in lines:
            asked = json.loads(line)
            if asked["do"] == "bind":
                case = Case(**asked["case"])
                answer = job.bind(case, asked["check"], asked["warmup"])
            else:
                answer = job.measure(asked["contestant"], asked["num_calls"])
            print(json.dumps(answer), file=lines, flush=True)
    if names[0] in MPIS:
        from mpi4py import MPI

        MPI.Finalize()  # MPICH would leave a file in /dev/shm
    # The peers get here together; a library that waits for them on exit is not what is measured.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
