"""What the processes of test_emulated_device.py do: ranks on the emulated CUDA runtime."""

import os
import random
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_cases import OPS, REDUCED
from emulated_bindings import install
from ranks import init
from test_backend_bits import draw
from torch import Tensor

import primitives
from primitives.backend import native
from primitives.errors import CollectiveError, CollectiveMismatch

# torch views complex tensors as real ones by an operator of the device, which is not emulated.
REAL = [(dtype, name) for dtype, name in REDUCED if not dtype.is_complex]
NUMELS = (0, 1, 3, 60, 511, 4096, 20_001)


def bits_equal(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def start(hosts: str = "", timeout_s: float = 60.0) -> tuple[ModuleType, int, int]:
    """Joins the group, on the host of a letter each; the emulation, rank and world size."""
    device = install(os.environ["TEST_BINDINGS"])
    if hosts:
        os.environ["PRIMITIVES_HOST_ID"] = hosts[int(os.environ["TEST_RANK"])]
    return device, *init(timeout_s)


class Buffers:
    """Every tensor that a call may take: on the CPU, or as views on the device."""

    def __init__(self, numel: int, n: int, dtype: torch.dtype, seed: int) -> None:
        self.all = [draw((k,), dtype, seed + i) for i, k in enumerate([numel, n * numel])]
        self.all += [draw((numel,), dtype, seed + 10 + i) for i in range(2 * n)]
        self.all.append(draw((n * numel,), dtype, seed + 2))
        self.n = n

    def clone(self, view: Callable[[Tensor], Tensor]) -> "Buffers":
        """Copies, each seen by ``view``."""
        copy = object.__new__(Buffers)
        copy.n, copy.all = self.n, [view(x.clone()) for x in self.all]
        return copy

    @property
    def shard(self) -> Tensor:
        return self.all[0]

    @property
    def full(self) -> Tensor:
        return self.all[1]

    @property
    def other_full(self) -> Tensor:
        return self.all[-1]

    @property
    def ins(self) -> list[Tensor]:
        return self.all[2 : 2 + self.n]

    @property
    def outs(self) -> list[Tensor]:
        return self.all[2 + self.n : 2 + 2 * self.n]


def coalesced(x: Buffers, op: Any) -> None:
    with dist._coalescing_manager(device=x.shard.device, async_ops=True) as works:
        for one in x.ins:
            dist.all_reduce(one, op)
    works.wait()


def later(x: Buffers, op: Any) -> None:
    works = [dist.all_reduce(one, op, async_op=True) for one in (x.full, x.shard)]
    for work in reversed(works):
        assert work is not None
        work.wait()


def rooted(x: list[Tensor], root: int) -> list[Tensor] | None:
    return x if dist.get_rank() == root else None


REDUCTIONS: dict[str, Callable[[Buffers, int, Any], Any]] = {
    "all_reduce": lambda x, root, op: dist.all_reduce(x.full, op),
    "reduce": lambda x, root, op: dist.reduce(x.full, root, op),
    "reduce_scatter": lambda x, root, op: dist.reduce_scatter_tensor(x.shard, x.full, op),
    "reduce_scatter list": lambda x, root, op: dist.reduce_scatter(x.shard, x.ins, op),
    "coalesced": lambda x, root, op: coalesced(x, op),
    "asynchronous": lambda x, root, op: later(x, op),
}
MOVES: dict[str, Callable[[Buffers, int, Any], Any]] = {
    "broadcast": lambda x, root, op: dist.broadcast(x.full, root),
    "all_gather": lambda x, root, op: dist.all_gather_into_tensor(x.full, x.shard),
    "all_gather list": lambda x, root, op: dist.all_gather(x.outs, x.shard),
    "all_to_all": lambda x, root, op: dist.all_to_all(x.outs, x.ins),
    "all_to_all tensor": lambda x, root, op: dist.all_to_all_single(x.other_full, x.full),
    "gather": lambda x, root, op: dist.gather(x.shard, rooted(x.outs, root), root),
    "scatter": lambda x, root, op: dist.scatter(x.shard, rooted(x.ins, root), root),
    "barrier": lambda x, root, op: dist.barrier(),
}
CALLS = REDUCTIONS | MOVES


def fused(device: ModuleType, rank: int, n: int) -> None:
    """The fused collectives, on the device and the CPU."""
    from primitives import collectives

    cut = [[3, 5, 0, 1000][:n], [7] * n]
    for accumulate in (False, True):
        results = []
        for view in (lambda x: x, lambda x: device.on_device(x, 0)):
            fulls = [draw((sum(of),), torch.bfloat16, 5 * rank + i) for i, of in enumerate(cut)]
            fulls = [x.nan_to_num() for x in fulls]
            shards = [torch.ones(of[rank]) for of in cut]
            squares, casts = torch.empty(2), [torch.zeros(sum(of)).half() for of in cut]
            options = {"factor": 0.5, "accumulate": accumulate, "numels": cut}
            collectives.reduce_scatter(
                [view(x) for x in fulls],
                [view(x) for x in shards],
                squares=view(squares),
                **options,
            )
            device.synchronize()
            collectives.all_gather([view(x) for x in shards], [view(x) for x in casts], numels=cut)
            device.synchronize()
            results.append([*shards, squares, *casts])
        assert all(bits_equal(a, b) for a, b in zip(*results, strict=True))


def bits_of_the_cpu(hosts: str, failing: str, num_cases: str, said: str) -> None:
    """Random calls on the device and on the CPU, in one group: equal bits, in every buffer.

    Args:
        hosts: a letter for the host of each rank.
        failing: the call of the runtime that fails on rank 1 when the ranks meet; "": none.
        num_cases: of random calls.
        said: part of the only warning, on rank 0; "": there is none.
    """
    device, rank, n = start(hosts)
    drawn = random.Random(7)  # equal on all ranks
    if failing and rank == 1:
        device.fail_next(failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in range(int(num_cases)):
            name = [*CALLS][case] if case < len(CALLS) else drawn.choice([*CALLS])
            dtype, op = drawn.choice(REAL)
            numel, root = drawn.choice(NUMELS), drawn.randrange(n)
            given = Buffers(numel, n, dtype, 100 * case + 20 * rank)
            expected, on_device = given.clone(lambda x: x), given.clone(lambda x: x)
            CALLS[name](expected, root, OPS[op])
            views = object.__new__(Buffers)
            views.n, views.all = n, [device.on_device(x, 0) for x in on_device.all]
            CALLS[name](views, root, OPS[op])
            device.synchronize()
            for got, want in zip(on_device.all, expected.all, strict=True):
                same = bits_equal(got, want)
                if not same and dtype.is_floating_point:  # on a device a NaN has one form
                    same = torch.equal(got.isnan(), want.isnan()) and bits_equal(
                        got.nan_to_num(), want.nan_to_num()
                    )
                assert same, (case, name, dtype, op, numel, root)
        fused(device, rank, n)
    texts = [str(w.message) for w in caught if "on CUDA are handed to the host" in str(w.message)]
    assert len(texts) == (1 if said and rank == 0 else 0), texts
    assert all(said in text for text in texts), texts
    if said:
        refuses_a_capture(device)
    part = dist.new_group([0, n - 1])
    if rank in (0, n - 1):
        x = torch.full((5,), rank + 1.0)
        dist.all_reduce(device.on_device(x, 0), group=part)
        device.synchronize()
        assert x.tolist() == [n + 1.0] * 5
    dist.barrier()
    dist.destroy_process_group()


def refuses_a_capture(device: ModuleType) -> None:
    """... with a clear error, after which the group goes on."""
    x = torch.ones(4)
    device.set_captured(True)
    message = r"all_reduce on cuda:0: expected a stream that is not captured .* way of the host"
    with pytest.raises(ValueError, match=message):
        dist.all_reduce(device.on_device(x, 0))
    device.set_captured(False)
    dist.all_reduce(device.on_device(x, 0))
    assert x.tolist() == [dist.get_world_size()] * 4


def another_device(hosts: str) -> None:
    device, _, n = start(hosts)
    x, y = torch.ones(4), torch.ones(4)
    dist.all_reduce(device.on_device(x, 0))
    message = "expected tensors on cuda:0, the device of this group's first call, got one on cuda:1"
    with pytest.raises(ValueError, match=message):
        dist.all_reduce(device.on_device(y, 1))
    dist.all_reduce(device.on_device(y, 0))
    device.synchronize()
    assert y.tolist() == [n] * 4
    dist.barrier()
    dist.destroy_process_group()


def a_mismatch(hosts: str) -> None:
    """Named as on the CPU, whichever way the call goes."""
    device, rank, _ = start(hosts)
    x = torch.ones(4)
    dist.all_reduce(device.on_device(x, 0))
    device.synchronize()

    def differ() -> None:
        dist.all_reduce(device.on_device(x[: 3 if rank == 1 else 4], 0))
        device.synchronize()
        dist.barrier()

    with pytest.raises(CollectiveMismatch, match=r"all_reduce\(sum, float32, "):
        differ()


def a_copy_that_fails(hosts: str) -> None:
    """It is the failure of all ranks."""
    device, rank, _ = start(hosts)
    x = torch.ones(4)
    if rank == 1:
        device.fail_next("export")
    dist.all_reduce(device.on_device(x, 0))
    dist.barrier()
    if rank == 1:
        device.fail_next("copy")
    with pytest.raises(CollectiveError, match=r"rank 1.* by way of the host: cannot be copied"):
        dist.all_reduce(device.on_device(x, 0))


def symmetric(hosts: str) -> None:
    """Tensors in symmetric memory: bits, which calls read them in place, and mistakes."""
    device, rank, n = start(hosts)
    backend = native(None, "symmetric")
    direct = len(set(hosts)) == 1
    numel = 100_000

    def filled(tensor: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor on the device, and as the host sees it, with values."""
        assert (tensor.device, tensor.shape) == (torch.device("cuda", 0), values.shape)
        return tensor, device.on_host(tensor).copy_(values)

    def both(call: Callable[[Tensor, Tensor], Any], given: Tensor, out: Tensor) -> None:
        """On the CPU, and on the device twice, since a call on a new chunk may be staged."""
        wanted, want_out = given.clone(), out.clone()
        call(wanted, want_out)
        for turn in range(2):
            before = backend.num_zero_copy
            tensor, seen = filled(primitives.empty(*given.shape, device="cuda"), given)
            got_out = out.clone()
            call(tensor, device.on_device(got_out, 0))
            device.synchronize()
            assert bits_equal(seen, wanted)
            assert bits_equal(got_out, want_out)
            assert backend.num_zero_copy - before <= direct
            assert turn == 0 or backend.num_zero_copy - before == direct

    x = draw((numel,), torch.float32, rank).nan_to_num()
    full = draw((n * numel,), torch.float32, 9 + rank).nan_to_num()
    both(lambda one, _: dist.all_reduce(one), x, torch.empty(0))
    both(lambda one, _: dist.broadcast(one, n - 1), x, torch.empty(0))
    both(lambda one, out: dist.all_gather_into_tensor(out, one), x, torch.zeros(n * numel))
    both(lambda one, out: dist.reduce_scatter_tensor(out, one), full, torch.zeros(numel))
    both(lambda one, out: dist.all_to_all_single(out, one), full, torch.zeros(n * numel))

    fused_symmetric(device, rank, n, direct)

    # One rank alone has symmetric memory: all stage.
    before, wanted = backend.num_zero_copy, x.clone()
    ordinary = device.on_device(x.clone(), 0)
    own = backend.allocate_tensor(numel, dtype=torch.float32, device=torch.device("cuda", 0))
    tensor, seen = filled(own if rank == 0 else ordinary, x)
    dist.all_reduce(tensor)
    device.synchronize()
    dist.all_reduce(wanted)
    assert bits_equal(seen, wanted)
    assert backend.num_zero_copy == before

    if direct:
        device.set_captured(True)
        with pytest.raises(ValueError, match="expected a stream that is not captured"):
            backend.allocate_tensor(numel, dtype=torch.float32, device=torch.device("cuda", 0))
        device.set_captured(False)
        device.set_captured(rank == 1)  # one rank alone: all refuse
        with pytest.raises(ValueError, match=r"empty: rank 1: .*stream that is not captured"):
            primitives.empty(4, device="cuda")
        device.set_captured(False)
    with pytest.raises(ValueError, match="expected cpu or cuda, got meta"):
        primitives.empty(4, device="meta")
    if rank == 1:
        device.fail_next("export" if direct else "allocate")
    message = "empty: rank 1 has no room for 67108[0-9]* bytes on device 0: (cannot be|out of)"
    with pytest.raises(CollectiveError, match=message):
        primitives.empty(1 << 24, device="cuda")
    outlives = device.on_host(primitives.empty(1 << 24, device="cuda"))
    with pytest.raises(CollectiveMismatch, match=r"empty\(float32, numel [45]\)"):
        primitives.empty(5 if rank == 1 else 4, device="cuda")
    with pytest.raises(CollectiveError):
        backend.allocate_tensor(4, dtype=torch.float32, device=torch.device("cuda", 0))
    dist.destroy_process_group()
    assert outlives.fill_(3)[-1] == 3


def fused_symmetric(device: ModuleType, rank: int, n: int, direct: bool) -> None:
    """Fused calls on tensors in symmetric memory, of which the last time one is elsewhere."""
    from primitives import collectives

    backend, where = native(None, "symmetric"), torch.device("cuda", 0)
    cut = [[30_000] * n, [7 + r for r in range(n)]]
    wholes = [draw((sum(c),), torch.float32, i).nan_to_num() for i, c in enumerate(cut)]
    grads = [draw((sum(c),), torch.bfloat16, 9 * rank + i).nan_to_num() for i, c in enumerate(cut)]
    shards = [x.split(c)[rank].clone() for x, c in zip(wholes, cut, strict=True)]

    def both(ins: list[Tensor], fulls: list[Tensor], sums: list[Tensor]) -> None:
        collectives.all_gather(ins[:2], fulls, numels=cut)
        collectives.reduce_scatter(ins[2:], sums, factor=0.5, numels=cut)

    def outs() -> tuple[list[Tensor], list[Tensor]]:
        return [torch.zeros(sum(c)).bfloat16() for c in cut], [torch.zeros(c[rank]) for c in cut]

    given = [*shards, *grads]
    want = outs()
    both(given, *want)
    ins = [backend.allocate_tensor(len(x), dtype=x.dtype, device=where) for x in given]
    for one, x in zip(ins, given, strict=True):
        device.on_host(one).copy_(x)
    for turn in range(3):
        if turn == 2 and rank == 0:
            ins = [device.on_device(shards[0].clone(), 0), *ins[1:3], device.on_device(grads[1], 0)]
        got = outs()
        before = backend.num_zero_copy
        both(ins, *([device.on_device(x, 0) for x in of] for of in got))
        device.synchronize()
        for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
            assert bits_equal(a, b)
        assert turn == 0 or backend.num_zero_copy - before == (2 if direct and turn == 1 else 0)


def communicator(hosts: str, kind: str) -> None:
    """Every operation on arrays of another library; what was asked of it; mistakes."""
    device = install(os.environ["TEST_BINDINGS"])
    rank, n = int(os.environ["TEST_RANK"]), int(os.environ["TEST_WORLD_SIZE"])
    os.environ["PRIMITIVES_HOST_ID"] = hosts[rank]
    import emulated_arrays
    import numpy as np
    from gpu.gpu_communicator_ranks import surface

    from primitives.communicator import Communicator

    made: list[Any] = []

    def make(array: np.ndarray, **options: Any) -> Any:
        made.append(getattr(emulated_arrays, kind)(array.copy("K"), device, **options))
        return made[-1]

    store = dist.FileStore(os.environ["TEST_STORE"], n)
    with Communicator(store, rank, n, timeout_s=60) as comm:
        for given, asked in ((None, 1), (0, 1), (device.stream(), device.stream())):
            surface(comm, make, **({} if given is None else {"stream": given}))
            comm.barrier()
            assert all(stream == asked for array in made for stream in array.streams)
            assert any(array.streams for array in made) == (kind != "Interface")
            made.clear()
        x = make(np.ones(4))
        for call, message in (
            (lambda: comm.all_reduce(make(np.ones((4, 4)).T)), "expected contiguous memory, got"),
            (lambda: comm.all_gather(np.ones(4 * n), x), "expected memory on cuda:0, got cpu"),
            (lambda: comm.all_gather(x, make(np.ones(4, "i4"))), "dtype int32, got float64"),
            (lambda: comm.all_to_all(x, x), "expected memory apart from the input"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        if kind != "Old":
            with pytest.raises(ValueError, match="expected writable memory, got read-only memory"):
                comm.all_reduce(make(np.ones(4), readonly=True))
        comm.all_reduce(x)
        assert x.get().tolist() == [n] * 4
        for turn in range(2):  # symmetric memory; a call on a new chunk may be staged
            before = comm.num_zero_copy
            tensor = comm.empty(2, 50_000, device="cuda", stream=device.stream() if turn else None)
            seen = device.on_host(tensor).fill_(rank + 1)
            comm.all_reduce(tensor)
            assert bits_equal(seen, torch.full_like(seen, n * (n + 1) / 2))
            assert turn == 0 or comm.num_zero_copy - before == (len(set(hosts)) == 1)
            assert tensor.__cuda_array_interface__["data"] == (seen.data_ptr(), False)
        with pytest.raises(ValueError, match="expected cpu or cuda, got meta"):
            comm.empty(4, device="meta")
        comm.barrier()
