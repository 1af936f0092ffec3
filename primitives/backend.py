"""The ``torch.distributed`` backend "primitives": shared memory inside a host, gloo between hosts.

``dist.init_process_group("primitives")`` under torchrun, mpirun or srun, or with store, rank and
world_size. Sums run along the adjacent-pair tree over group ranks (``primitives.reference``), so
they are the same bits for every message size and every run.

[Note: autoload] ``import torch`` ends by loading this module, for its entry point ``register``; and
this module may itself be what imports torch first. So torch is imported only inside functions here
and in rendezvous.py: whoever comes first, ``register`` is defined when torch asks for it.
"""

import atexit
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from primitives.env import SHM_DIR
from primitives.errors import RanksOnSeveralHosts
from primitives.hosts import connect_hosts, find_hosts
from primitives.rendezvous import install

if TYPE_CHECKING:
    import torch.distributed as dist

    import primitives._C as _C

NAME = "primitives"
EXIT_LIMIT_S = 2.0  # for collectives still queued when the interpreter ends


def register() -> None:
    """Make "primitives" known to ``torch.distributed``; cheap, and does nothing the second time.

    Contract: also the ``torch.backends`` entry point, so it runs on a bare ``import torch``; the
    native code is loaded when the first process group is made.
    """
    import torch.distributed as dist

    if not dist.is_available() or NAME in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])
    install()


def _create(group: Any, options: Any) -> "_C.Backend":
    """A backend for one process group, from torch's DistributedBackendOptions."""
    import primitives._C as _C

    if not isinstance(options, _C.Backend.Options):
        options = _C.Backend.Options(_as_timedelta(group.timeout))
    else:
        options = options.__deepcopy__({})
    options.shm_dir = SHM_DIR.get()
    options.group_name = group.group_id
    options.global_ranks_in_group = group.global_ranks_in_group
    return create(group.store, group.group_rank, group.group_size, options)


def create(store: Any, rank: int, world_size: int, options: "_C.Backend.Options") -> "_C.Backend":
    """A backend on whatever hosts the ranks run; collective over the ranks of ``store``."""
    import primitives._C as _C

    try:
        backend = _C.Backend(store, rank, world_size, options)
    except RanksOnSeveralHosts:
        timeout_s = options._timeout.total_seconds()
        hosts = find_hosts(store, rank, world_size, timeout_s, options.group_name)
        wire = connect_hosts(store, rank, world_size, timeout_s)
        backend = _C.Backend(store, rank, world_size, options, hosts, wire)
    atexit.unregister(_C.close_all_backends)
    atexit.register(_C.close_all_backends, EXIT_LIMIT_S)
    return backend


def native(group: "dist.ProcessGroup | None", operation: str) -> "_C.Backend":
    """The native backend of a process group (default: the world).

    Raises:
        ValueError: the group's CPU backend is another one.
    """
    import torch
    import torch.distributed as dist

    import primitives._C as _C

    backend: Any = (group or dist.distributed_c10d._get_default_group())._get_backend(
        torch.device("cpu")
    )
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
    if not isinstance(backend, _C.Backend):
        raise ValueError(
            f"{operation}: expected a process group of the primitives backend, got {backend.name()}"
        )
    return backend


def _as_timedelta(timeout: Any) -> timedelta:
    return timeout if isinstance(timeout, timedelta) else timedelta(seconds=float(timeout))


register()
