"""Who is measured: each binds a case to its own call and buffers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from primitives.bench.case import Case, bytes_moved, storage_dtype
from primitives.bench.payload import Array

if TYPE_CHECKING:
    import torch

Run = Callable[[], object]
Allocate = Callable[[int, "np.dtype[Any]"], Array]


def nothing() -> None:
    """What most contestants have to do besides the call."""


@dataclass
class Bound:
    """One call, ready to be repeated: ``send`` is read and ``recv`` written (may overlap)."""

    run: Run
    send: Array
    recv: Array
    load: Run = nothing
    """Brings ``send`` to where the call reads it ..."""
    fetch: Run = nothing
    """... and what it wrote to ``recv``."""
    finish: Run = nothing
    """Waits for the calls that were made."""


class Contestant(Protocol):
    """One implementation of the collectives, on the ranks of one job."""

    def bind(self, case: Case, rank: int) -> Bound | None:
        """The case on fresh, touched buffers; None where the implementation has no such call."""


def zeros(numel: int, dtype: "np.dtype[Any]") -> Array:
    """In private memory."""
    return np.zeros(numel, dtype)


def buffers(case: Case, rank: int, allocate: Allocate = zeros) -> tuple[Array, Array]:
    """Input and output, one inside the other when the case is in place."""
    dtype = storage_dtype(case.dtype)
    return placed(case, rank, allocate(case.send_numel, dtype), allocate(case.recv_numel, dtype))


def placed(case: Case, rank: int, send: Any, recv: Any) -> tuple[Any, Any]:
    """Input and output, one inside the other when the case is in place."""
    if case.in_place:
        own = slice(rank * case.count, (rank + 1) * case.count)
        match case.op:
            case "all_gather":
                send = recv[own]
            case "reduce_scatter":
                recv = send[own]
            case _:
                recv = send
    return send, recv


def as_tensor(array: Array, dtype: str) -> "torch.Tensor":
    """The same memory as a tensor of the case's dtype."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def zeros_by(empty: "Callable[..., torch.Tensor]") -> Allocate:
    """Allocates through ``empty(nbytes, dtype=)``."""
    import torch

    def allocate(numel: int, dtype: "np.dtype[Any]") -> Array:
        array: Array = empty(numel * dtype.itemsize, dtype=torch.uint8).zero_().numpy().view(dtype)
        return array

    return allocate


class C10d:
    """A process group of torch.distributed, on private or on symmetric memory."""

    def __init__(self, backend: str, *, symmetric: bool = False) -> None:
        import torch.distributed as dist

        from primitives.memory import empty

        if backend == "fake":  # registers itself
            import torch.testing._internal.distributed.fake_pg  # noqa: F401
        self.group = dist.new_group(backend=backend)
        self.allocate = zeros_by(partial(empty, group=self.group)) if symmetric else zeros

    def bind(self, case: Case, rank: int) -> Bound | None:
        """The public function of torch.distributed on the case."""
        send, recv = buffers(case, rank, self.allocate)
        source, target = as_tensor(send, case.dtype), as_tensor(recv, case.dtype)
        return Bound(self.call(case, source, target), send, recv)

    def call(self, case: Case, source: "torch.Tensor", target: "torch.Tensor") -> Run:
        """... on these tensors."""
        import torch.distributed as dist

        from primitives.collectives import all_gather_flat, reduce_scatter_flat

        group, root = self.group, case.root
        reduce_op = getattr(dist.ReduceOp, {"prod": "PRODUCT"}.get(case.reduce_op) or
                            case.reduce_op.upper())  # fmt: skip
        runs: dict[str, Run] = {
            "all_gather": lambda: all_gather_flat(target, source, group=group),
            "reduce_scatter": lambda: reduce_scatter_flat(
                target, source, op=reduce_op, group=group
            ),
            "all_reduce": lambda: dist.all_reduce(target, op=reduce_op, group=group),
            "all_to_all": lambda: dist.all_to_all_single(target, source, group=group),
            "broadcast": lambda: dist.broadcast(target, src=root, group=group),
            "barrier": lambda: dist.barrier(group=group),
        }
        return runs[case.op]


class Raw:
    """``primitives.communicator`` without torch.distributed, on private or symmetric memory."""

    def __init__(self, store: Any, rank: int, world_size: int, *, symmetric: bool = False) -> None:
        from primitives.communicator import Communicator

        self.communicator = Communicator.from_store(store, rank, world_size)
        self.allocate = zeros_by(self.communicator.empty) if symmetric else zeros

    def bind(self, case: Case, rank: int) -> Bound | None:
        """The communicator's method on the case."""
        send, recv = buffers(case, rank, self.allocate)
        # NumPy has no bfloat16; a tensor over the same memory does.
        source: Any = as_tensor(send, case.dtype) if case.dtype == "bfloat16" else send
        target: Any = as_tensor(recv, case.dtype) if case.dtype == "bfloat16" else recv
        to, op, root = self.communicator, case.reduce_op, case.root
        op = {"prod": "product"}.get(op, op)
        runs: dict[str, Run] = {
            "all_gather": lambda: to.all_gather(target, source),
            "reduce_scatter": lambda: to.reduce_scatter(target, source, op),
            "all_reduce": lambda: to.all_reduce(target, op),
            "all_to_all": lambda: to.all_to_all(target, source),
            "broadcast": lambda: to.broadcast(target, root),
            "barrier": to.barrier,
        }
        return Bound(runs[case.op], send, recv)


class Mpi:
    """The MPI that this process was started under, through mpi4py's buffer calls."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.mpi = MPI
        self.comm = MPI.COMM_WORLD

    def bind(self, case: Case, rank: int) -> Bound | None:
        """The MPI call on the case; None for what MPI has no type or operation for."""
        mpi, comm = self.mpi, self.comm
        moved_as = {"bfloat16": mpi.BYTE, "float16": mpi.BYTE}
        types = {
            "int8": mpi.INT8_T, "uint8": mpi.UINT8_T, "int32": mpi.INT32_T, "int64": mpi.INT64_T,
            "float32": mpi.FLOAT, "float64": mpi.DOUBLE,
        }  # fmt: skip
        reduce_ops = {"sum": mpi.SUM, "prod": mpi.PROD, "min": mpi.MIN, "max": mpi.MAX}
        reduces = case.op in ("reduce_scatter", "all_reduce")
        if reduces and (case.dtype in moved_as or case.reduce_op not in reduce_ops):
            return None
        send, recv = buffers(case, rank)
        kind = types.get(case.dtype, mpi.BYTE)
        items = case.itemsize if kind == mpi.BYTE else 1
        send_all, recv_all = [send, send.size * items, kind], [recv, recv.size * items, kind]
        part = case.count * items
        op = reduce_ops.get(case.reduce_op, mpi.SUM)
        source: Any = mpi.IN_PLACE if case.in_place else send_all
        runs: dict[str, Run] = {
            "all_gather": lambda: comm.Allgather(source, [recv, part, kind]),
            "all_reduce": lambda: comm.Allreduce(source, recv_all, op),
            "all_to_all": lambda: comm.Alltoall([send, part, kind], [recv, part, kind]),
            "broadcast": lambda: comm.Bcast(recv_all, case.root),
            "barrier": comm.Barrier,
        }
        if case.op == "reduce_scatter":
            if case.in_place:
                # MPI leaves the result at the start of the buffer.
                whole, recv = [send, part, kind], send[: case.count]
                return Bound(lambda: comm.Reduce_scatter_block(mpi.IN_PLACE, whole, op), send, recv)
            return Bound(
                lambda: comm.Reduce_scatter_block([send, kind], [recv, kind], op), send, recv
            )
        return Bound(runs[case.op], send, recv)


class Copy:
    """The limit: the same ranks, all at once, copy as many bytes as the operation must move."""

    def __init__(self, *, stream: bool) -> None:
        self.stream = stream  # around the caches

    def bind(self, case: Case, rank: int) -> Bound | None:
        """A copy that reads and writes this rank's share of bytes_moved()."""
        from primitives import _C

        nbytes = bytes_moved(case.op, case.nbytes, case.world_size) // (2 * case.world_size)
        if nbytes == 0:
            return None
        source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        return Bound(lambda: _C.copy_bytes(target, source, self.stream), source, target)
