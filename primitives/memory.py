"""Tensors in memory that all ranks of a group have mapped: collectives on them copy nothing twice.

torch is imported inside functions, as in ``primitives.backend`` ([Note: autoload]).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


def empty(
    *shape: int,
    dtype: "torch.dtype | None" = None,
    symmetric: bool = True,
    device: "torch.device | str" = "cpu",
    group: "dist.ProcessGroup | None" = None,
) -> "torch.Tensor":
    """An uninitialized tensor in the symmetric memory of ``group``.

    Where the tensors of all ranks are symmetric, all_gather (outputs or inputs), reduce_scatter,
    all_to_all (inputs), all_reduce and broadcast of that group, and the fused collectives, read and
    write the peers' tensors in place: the same bits, sooner. In other groups, and beside ordinary
    tensors, it is an ordinary tensor. Views are symmetric too. On CUDA it is the inputs of
    all these operations that are read in place.

    Args:
        shape: sizes, or one sequence of them.
        dtype: any; default: torch's default dtype.
        symmetric: False makes a tensor in ordinary memory, and is no collective.
        device: "cpu", or the CUDA device of this rank; there the memory belongs to the stream that
            is current now, as it would with torch's own allocator.
        group: of the "primitives" backend. Default: the world.

    Returns:
        A tensor of its own storage, of a fixed size. Its memory is used again once it is freed, and
        outlives the group.

    Raises:
        CollectiveMismatch: ranks ask for different sizes or dtypes.
        CollectiveError: a rank has no room; on all ranks alike, and the group stays usable.
        ValueError: the group has another backend; another device than that of the group's first
            call on CUDA; the stream is captured into a graph.

    Contract: a collective of the group; every rank makes the same calls in the same order.
    """
    import torch

    from primitives.backend import native

    sizes = torch.Size(*shape) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    dtype = dtype or torch.get_default_dtype()
    if not symmetric:
        return torch.empty(sizes, dtype=dtype, device=device)
    return native(group, "empty").empty(list(sizes), dtype, torch.device(device))
