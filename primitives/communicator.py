"""The collectives on NumPy and CuPy arrays, torch tensors and other memory, without c10d.

Ranks meet through a torch Store, through MPI, or through a file; then they share memory (or talk by
gloo where they run on several hosts), with the bits, errors and deadlines of the backend.

    with Communicator.from_mpi(MPI.COMM_WORLD) as world:
        world.all_reduce(array)
"""

import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

import primitives._C as _C
from primitives.env import SHM_DIR
from primitives.errors import CollectiveTimeout, RanksOnSeveralHosts
from primitives.hosts import connect_hosts, find_hosts, host_id
from primitives.rendezvous import MeetingFile

if TYPE_CHECKING:
    from mpi4py import MPI

TIMEOUT_S = 300.0


class Communicator(_C.Communicator):
    """One rank of a group. Every method is a collective of all ranks, but for send and recv.

    Buffers are C-contiguous memory of the CPU or of one CUDA device: NumPy and CuPy arrays, torch
    tensors, or objects with the buffer protocol, DLPack or the CUDA array interface. Data that is
    only read may be read-only. Bytes move for every dtype (bool, complex, float8 too). Where ``n``
    is the world size:

    - ``all_gather(out [n * k], shard [k], counts=None)``: shards in rank order; ``counts``:
      elements of each rank's shard when they differ.
    - ``reduce_scatter(out [k], full [n * k], op="sum", counts=None)``: this rank's part.
    - ``all_reduce(data [k], op="sum")``: in place.
    - ``all_to_all(out, data, out_counts=None, data_counts=None)``: part r goes to rank r;
      the counts are elements from and to each rank.
    - ``broadcast(data, root=0)``: in place.
    - ``reduce(data [k], root=0, op="sum")``: in place on the root, the others keep theirs.
    - ``gather(out [n * k], shard [k], root=0)``: ``out`` is None but on the root.
    - ``scatter(out [k], full [n * k], root=0)``: ``full`` is None but on the root.
    - ``empty(*shape, dtype=, device=)``: memory in which the others copy nothing twice.
    - ``barrier()``.
    - ``send(data, dst, tag=0)``, ``recv(data, src=None, tag=0)``: None is any rank; recv returns
      the source. send returns when the data may be changed.
    - ``abort(why)``: ends the waits of all ranks with PeerLost.

    ``stream=None``, of all that take buffers: for those on a CUDA device, a cudaStream_t as an
    integer (0 or 1: the legacy default stream), on which the call is enqueued and the result is
    valid; the buffers live until then. None: the legacy default stream, and the call returns when
    the result is there. What the owner of a buffer enqueued before goes first, by the protocol that
    shows it. send and recv always wait.

    ``op``: sum, avg, premul_sum (times ``factor``), product, min, max, band, bor, bxor.

    Args:
        store: shared by the ranks, and not used by another communicator under the same prefix.
        rank: this process, in [0, world_size).
        world_size: number of ranks.
        timeout_s: the longest wait, for the others to come and in each collective, in seconds.
        name: what error messages call it.

    Raises:
        ValueError: an argument does not fit: not contiguous, read-only output, dtype, size, root.
        CollectiveMismatch: the ranks called different things; on every rank.
        CollectiveTimeout, PeerLost: as in ``primitives.errors``; afterwards all calls raise.

    Contract: calls of one communicator are made in the same order on all ranks, by one thread at a
        time, and return when the result is there (or, with a stream, on its way). An output
        overlaps no input, except that a rank's shard may already lie at its place. Memory on CUDA
        is that of the first such call's device; ranks that are threads give a stream each
        (docs/cuda.md).
    Numerics: reductions run along the tree over ranks (``primitives.reference``): the same bits on
        every rank, for every size.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        timeout_s: float = TIMEOUT_S,
        name: str = "communicator",
    ) -> None:
        native = (store, rank, world_size, timeout_s, name, SHM_DIR.get())
        try:
            super().__init__(*native)
        except RanksOnSeveralHosts:
            hosts = find_hosts(store, rank, world_size, timeout_s, name)
            wire = connect_hosts(store, rank, world_size, timeout_s)
            super().__init__(*native, hosts, wire)
        # The store is wanted by later splits, and its server by peers that have just met.
        self._store = store
        self._timeout_s = timeout_s
        self._num_splits = 0

    @classmethod
    def from_store(
        cls,
        store: Store,
        rank: int,
        world_size: int,
        *,
        timeout_s: float = TIMEOUT_S,
        name: str = "communicator",
    ) -> Self:
        """Meets through a store that all ranks share; see the class."""
        return cls(store, rank, world_size, timeout_s=timeout_s, name=name)

    @classmethod
    def from_mpi(
        cls, comm: "MPI.Intracomm", *, timeout_s: float = TIMEOUT_S, name: str = "communicator"
    ) -> Self:
        """Meets through an mpi4py communicator, also a part of the world; collective over it.

        MPI is used for the meeting and afterwards no more: ``comm`` may be freed.
        """
        rank, world_size = comm.Get_rank(), comm.Get_size()
        one_host = len(set(comm.allgather(host_id()))) == 1
        address = "127.0.0.1" if one_host else comm.bcast(socket.gethostname(), root=0)
        store = _serve(address, world_size, timeout_s) if rank == 0 else None
        port = comm.bcast(store.port if store else 0, root=0)
        return cls(
            store or _join(address, port, world_size, timeout_s),
            rank,
            world_size,
            timeout_s=timeout_s,
            name=name,
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        rank: int,
        world_size: int,
        *,
        timeout_s: float = TIMEOUT_S,
        name: str = "communicator",
    ) -> Self:
        """Meets through a file that rank 0 writes and removes again.

        Args:
            path: the same on all ranks; its folder exists. What a crashed job left there is
                replaced, never believed.

        Raises:
            CollectiveTimeout: a rank did not come; the message names it.
            ValueError: a living process meets its own ranks at this path.
        """
        meeting = MeetingFile(Path(path))
        if rank == 0:
            store = _serve("127.0.0.1", world_size, timeout_s)
            with meeting.announced(store.port):
                return cls(store, rank, world_size, timeout_s=timeout_s, name=name)
        deadline = time.monotonic() + timeout_s
        try:
            port = meeting.wait(rank, world_size, timeout_s)
        except TimeoutError as error:
            raise CollectiveTimeout(str(error)) from None
        left_s = max(deadline - time.monotonic(), 0.001)
        return cls(
            _join("127.0.0.1", port, world_size, left_s),
            rank,
            world_size,
            timeout_s=timeout_s,
            name=name,
        )

    def empty(  # type: ignore[override]
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        stream: int | None = None,
    ) -> torch.Tensor:
        """An uninitialized tensor in memory that every rank has mapped; ``primitives.empty``.

        Collective. ``.numpy()`` shows one of the CPU as an array, ``cupy.asarray`` one of a GPU. It
        outlives this communicator.

        Args:
            shape: sizes.
            dtype: any.
            device: "cpu", or a CUDA device; "cuda" is the thread's current one.
            stream: a cudaStream_t whose work the memory is for; None: the legacy default stream. It
                lives until the tensor is freed (docs/symmetric-memory.md).

        Raises:
            CollectiveMismatch: ranks ask for different sizes or dtypes.
            CollectiveError: a rank has no room; on all ranks alike, and the communicator stays
                usable.
        """
        place = torch.device(device)
        if place.type == "cpu":
            return super().empty(shape, dtype)
        if place.type != "cuda":
            raise ValueError(f"empty: device: expected cpu or cuda, got {device}")
        index = -1 if place.index is None else place.index
        return self.empty_on_device(shape, dtype, index, stream)

    def split(self, color: int | None, key: int = 0) -> "Communicator | None":
        """One communicator for all ranks of each color; collective over this one.

        Args:
            color: which part this rank joins, >= 0; None: none of them.
            key: the order within the part; equal keys keep the order of this communicator.

        Returns:
            The part, or None. It outlives this communicator, except for rank 0 of this one, whose
            process serves the store.
        """
        mine = np.array([-1 if color is None else color, key], np.int64)
        if color is not None and color < 0:
            raise ValueError(f"split: expected a color >= 0 or None, got {color}")
        every = np.empty((self.world_size, 2), np.int64)
        self.all_gather(every, mine)
        self._num_splits += 1
        part = None
        if color is not None:
            members = [r for r in range(self.world_size) if every[r, 0] == color]
            members.sort(key=lambda r: (every[r, 1], r))
            part = Communicator(
                PrefixStore(f"split{self._num_splits}/{color}", self._store),
                members.index(self.rank),
                len(members),
                timeout_s=self._timeout_s,
                name=f"{self.name}/{color}",
            )
        self.barrier()  # a rank that has no part may leave, and take the store with it
        return part

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _serve(address: str, world_size: int, timeout_s: float) -> TCPStore:
    """A store on a free port of this host, at the address by which the others know it."""
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(address, 0, world_size, True, timeout, wait_for_workers=False)


def _join(address: str, port: int, world_size: int, timeout_s: float) -> TCPStore:
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(address, port, world_size, False, timeout, wait_for_workers=False)
