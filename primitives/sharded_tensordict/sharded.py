"""ShardedTensorDict: a batch whose rows are spread over the ranks of a mesh dimension."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from primitives.sharded_tensordict import exchange, files
from primitives.sharded_tensordict.batch import Batch
from primitives.sharded_tensordict.columns import MetaPolicy
from primitives.sharded_tensordict.exchange import Exchange, Handle, Rows
from primitives.sharded_tensordict.rows import bounds, even_counts


class ShardedTensorDict(Batch):
    """This rank's rows of a batch that is spread over a mesh dimension.

    A tensor of ``tensors`` is this rank's shard: placement Shard(0) over ``mesh_dim``. A tensor of
    ``replicated`` belongs to the whole batch: a plain one is equal on all ranks, a DTensor has
    placements of its own. It has no rows, and no operation touches it.

    Collectives are called by all ranks of ``mesh_dim`` in the same order. If the ranks' batches do
    not fit together, all raise the same ValueError, naming rank, key and both sides, before a
    tensor moves. Their results share no memory with their inputs. The ``_async`` variants return a
    ``Handle`` as soon as the ranks have agreed.

    Args:
        tensors, columns, meta: as for ``Batch``.
        mesh, mesh_dim: where the rows are spread; a collective may name others.
        replicated: name -> tensor without rows, or DTensor.
    """

    def __init__(
        self,
        tensors: TensorDict,
        columns: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        mesh: DeviceMesh | None = None,
        mesh_dim: str | None = None,
        replicated: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(tensors, columns, meta)
        self.mesh = mesh
        self.mesh_dim = mesh_dim
        self.replicated = dict(replicated or {})

    @classmethod
    def from_local(cls, batch: Batch, mesh: DeviceMesh, mesh_dim: str) -> Self:
        """This rank's rows, as they are."""
        replicated = batch.replicated if isinstance(batch, ShardedTensorDict) else None
        return cls(
            batch.tensors,
            batch.columns,
            batch.meta,
            mesh=mesh,
            mesh_dim=mesh_dim,
            replicated=replicated,
        )

    @classmethod
    def from_global(cls, batch: Batch, mesh: DeviceMesh, mesh_dim: str) -> Self:
        """This rank's part of a batch that every rank has; cut as by ``chunk``, shares memory."""
        group = mesh.get_group(mesh_dim)
        return cls.from_local(batch.chunk(group.size())[group.rank()], mesh, mesh_dim)

    def placements(self, key: Any) -> tuple[Placement, ...]:
        """Of a tensor: Shard(0) over ``mesh_dim``; Replicate() without one; a DTensor's own."""
        if key in self.replicated:
            tensor = self.replicated[key]
            return tuple(tensor.placements) if isinstance(tensor, DTensor) else (Replicate(),)
        self.select([key])  # says what there is
        return (Replicate() if self.mesh is None else Shard(0),)

    def num_rows_by_rank(self) -> list[int]:
        """Rows of every rank of ``mesh_dim``. Collective."""
        counts: list[Any] = [None] * self._group(None, None).size()
        dist.all_gather_object(counts, len(self), group=self._group(None, None))
        return counts

    def global_shape(self, key: Any) -> torch.Size:
        """Of a tensor, all ranks' rows together; a jagged one has no such shape. Collective.

        Raises:
            ValueError: no such tensor, or it is jagged.
        """
        if key in self.replicated:
            return self.replicated[key].shape
        (leaf,) = self.select([key]).leaves().values()
        if leaf.is_nested:
            raise ValueError(f"global_shape: {key} is jagged")
        return torch.Size([sum(self.num_rows_by_rank()), *leaf.shape[1:]])

    def to_dtensor(self, key: Any) -> DTensor:
        """A tensor of this batch as a DTensor over ``mesh_dim``; shares memory. Collective.

        Raises:
            ValueError: no such tensor, it is jagged, or the rows are not cut as DTensor would.
        """
        if isinstance(kept := self.replicated.get(key), DTensor):
            return kept
        if self.mesh is None or self.mesh_dim is None:
            raise ValueError("to_dtensor: this batch is on no mesh")
        mesh = self.mesh[self.mesh_dim]
        if kept is not None:
            return DTensor.from_local(kept, mesh, [Replicate()], run_check=False)
        shape = self.global_shape(key)
        counts = self.num_rows_by_rank()
        expected = [len(part) for part in torch.arange(shape[0]).chunk(len(counts))]
        expected += [0] * (len(counts) - len(expected))
        if counts != expected:
            raise ValueError(f"to_dtensor: rows by rank are {counts}, DTensor needs {expected}")
        (leaf,) = self.select([key]).leaves().values()
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            leaf.contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def all_gather(
        self,
        mesh: DeviceMesh | None = None,
        mesh_dim: str | None = None,
        *,
        meta: MetaPolicy = "equal",
    ) -> Self:
        """The rows of all ranks, in rank order, on each of them; the result is on no mesh.

        Two collectives, whatever the number of tensors: one that tells rows, columns and meta, and
        one that carries the bytes of all tensors. Ranks may bring different numbers of rows, also
        none.

        Args:
            mesh, mesh_dim: the ranks; default: where the batch is spread.
            meta: how the ranks' meta becomes one, see ``columns.MetaPolicy``.

        Raises:
            ValueError: keys, dtypes, shapes of a row, wishes for gradients, or meta differ.

        Numerics: bytes are copied: every value arrives with the same bits, NaNs too. Where tensors
            require gradients, backward (collective) sums the gradients that all ranks have for a
            row, in the backend's order.
        """
        return self.all_gather_async(mesh, mesh_dim, meta=meta).wait()

    def all_gather_async(
        self,
        mesh: DeviceMesh | None = None,
        mesh_dim: str | None = None,
        *,
        meta: MetaPolicy = "equal",
    ) -> Handle[Self]:
        """As ``all_gather``; returns while the tensors travel. Those with gradients do not wait."""
        return self._everywhere(exchange.all_gather(self, self._group(mesh, mesh_dim), meta))

    def reduce_scatter(
        self,
        mesh: DeviceMesh | None = None,
        mesh_dim: str | None = None,
        *,
        op: str = "sum",
        meta: MetaPolicy = "equal",
    ) -> Self:
        """Reduces the full batches of all ranks row by row; each rank gets its rows, as ``chunk``.

        Args:
            mesh, mesh_dim, meta: as for ``all_gather``.
            op: sum, avg, min or max; one collective for each dtype.

        Raises:
            ValueError: as ``all_gather``; or other numbers of rows, columns that differ, a jagged
                tensor, or a gradient wanted of another op than sum.

        Numerics: in the dtype of the tensor, in the backend's order. Backward gathers.
        """
        return self.reduce_scatter_async(mesh, mesh_dim, op=op, meta=meta).wait()

    def reduce_scatter_async(
        self,
        mesh: DeviceMesh | None = None,
        mesh_dim: str | None = None,
        *,
        op: str = "sum",
        meta: MetaPolicy = "equal",
    ) -> Handle[Self]:
        """As ``reduce_scatter``; returns while the tensors travel."""
        start = exchange.reduce_scatter(self, self._group(mesh, mesh_dim), op, meta)
        return self._spread(start, mesh, mesh_dim)

    def all_to_all(
        self,
        num_rows: Sequence[int],
        mesh: DeviceMesh | None = None,
        mesh_dim: str | None = None,
        *,
        meta: MetaPolicy = "equal",
    ) -> Self:
        """Sends consecutive rows to every rank: ``num_rows[rank]`` of them; the sum is all rows.

        Returns:
            The rows received, in rank order.

        Raises:
            ValueError: as ``all_gather``; or the numbers do not add up, or a gradient is wanted.
        """
        return self.all_to_all_async(num_rows, mesh, mesh_dim, meta=meta).wait()

    def all_to_all_async(
        self,
        num_rows: Sequence[int],
        mesh: DeviceMesh | None = None,
        mesh_dim: str | None = None,
        *,
        meta: MetaPolicy = "equal",
    ) -> Handle[Self]:
        """As ``all_to_all``; returns while the tensors travel."""
        group = self._group(mesh, mesh_dim)
        return self._spread(exchange.all_to_all(self, num_rows, group, meta), mesh, mesh_dim)

    def redistribute(self, mesh_dim: str, *, meta: MetaPolicy = "equal") -> Self:
        """The same rows in the same order, spread over another dimension of the mesh.

        Every rank takes from each rank of the old dimension only what it needs. Collective over the
        old dimension, whose ranks along the new one hold the same rows.

        Args:
            mesh_dim: the new dimension; there the rows are cut as by ``chunk``.
        """
        group = self._group(None, None)
        assert self.mesh is not None
        new = self.mesh.get_group(mesh_dim)
        counts = self.num_rows_by_rank()
        first, _ = bounds(counts)[group.rank()]
        start, end = bounds(even_counts(sum(counts), new.size()))[new.rank()]
        needed = self[max(0, start - first) : max(0, end - first)]
        return self.from_local(needed.all_gather(meta=meta), self.mesh, mesh_dim)

    @classmethod
    def broadcast(
        cls,
        batch: Batch | None,
        mesh: DeviceMesh,
        mesh_dim: str,
        *,
        root: int = 0,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The root's batch on all ranks of a mesh dimension; without what is ``replicated``.

        Args:
            batch: on the root; of other ranks it is not looked at.
            root: rank within the dimension.
            device: where the tensors travel and arrive.

        Raises:
            ValueError: the root has none.
        """
        started = cls.broadcast_async(batch, mesh, mesh_dim, root=root, device=device)
        return started.wait()

    @classmethod
    def broadcast_async(
        cls,
        batch: Batch | None,
        mesh: DeviceMesh,
        mesh_dim: str,
        *,
        root: int = 0,
        device: torch.device | str = "cpu",
    ) -> Handle[Self]:
        """As ``broadcast``; returns while the tensors travel."""
        group = mesh.get_group(mesh_dim)
        start = exchange.broadcast(batch, group, root, torch.device(device))
        return cls(TensorDict({}, batch_size=[0]))._everywhere(start)

    def save(self, path: Path) -> None:
        """This rank's batch as one safetensors file; see ``files.save``."""
        files.save(self, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """A batch that ``save`` wrote; see ``files.load``."""
        return cls(*files.load(path))

    def memmap(self, folder: Path) -> None:
        """This rank's batch as memory-mapped files; see ``files.memmap``."""
        files.memmap(self, folder)

    @classmethod
    def load_memmap(cls, folder: Path) -> Self:
        """A batch that ``memmap`` wrote, without reading it; see ``files.load_memmap``."""
        return cls(*files.load_memmap(folder))

    def _group(self, mesh: DeviceMesh | None, mesh_dim: str | None) -> dist.ProcessGroup:
        mesh, mesh_dim = mesh or self.mesh, mesh_dim or self.mesh_dim
        if mesh is None or mesh_dim is None:
            raise ValueError("this batch is on no mesh: pass mesh and mesh_dim")
        return mesh.get_group(mesh_dim)

    def _spread(
        self, start: Exchange, mesh: DeviceMesh | None, mesh_dim: str | None
    ) -> Handle[Self]:
        return Handle(lambda: self._made_of(start(), mesh or self.mesh, mesh_dim or self.mesh_dim))

    def _everywhere(self, start: Exchange) -> Handle[Self]:
        return Handle(lambda: self._made_of(start(), None, None))

    def _made_of(self, rows: Rows, mesh: DeviceMesh | None, mesh_dim: str | None) -> Self:
        return type(self)(
            self._build(rows.leaves, rows.num_rows),
            rows.columns,
            rows.meta,
            mesh=mesh,
            mesh_dim=mesh_dim,
            replicated=self.replicated,
        )

    def _with(
        self,
        tensors: TensorDict,
        columns: Mapping[str, Any],
        meta: Mapping[str, Any] | None = None,
    ) -> Self:
        return type(self)(
            tensors,
            columns,
            self.meta if meta is None else meta,
            mesh=self.mesh,
            mesh_dim=self.mesh_dim,
            replicated=self.replicated,
        )
