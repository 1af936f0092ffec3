"""Which ranks share memory, and the connections between those that do not."""

import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from primitives.env import HOST_ID
from primitives.errors import CollectiveTimeout


def host_id() -> str:
    """Equal for processes that can share memory; ``PRIMITIVES_HOST_ID`` overrides it."""
    return HOST_ID.get() or Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def find_hosts(store: Any, rank: int, world_size: int, timeout_s: float, name: str) -> list[str]:
    """The host of every rank; collective over the ranks of ``store``.

    Args:
        store: a torch Store.
        timeout_s: how long to wait for the others, in seconds.
        name: of the group, for messages.

    Raises:
        CollectiveTimeout: ranks did not come; the message names them.
    """
    if world_size == 1:
        return [host_id()]
    # A store may outlive a group of the same name, so each meeting has its own number.
    meeting = store.add(f"hosts/count/{rank}", 1)
    keys = [f"hosts/{meeting}/{r}" for r in range(world_size)]
    store.set(keys[rank], host_id())
    deadline = time.monotonic() + timeout_s
    pause_s = 1e-4
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = ", ".join(str(r) for r in range(world_size) if not store.check([keys[r]]))
            raise CollectiveTimeout(
                f"rank {rank} of group '{name}': rank {missing} did not come within "
                f"{timeout_s * 1e3:g} ms, while the group was being created"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.02)
    return [value.decode() for value in store.multi_get(keys)]


def connect_hosts(store: Any, rank: int, world_size: int, timeout_s: float) -> Any:
    """A gloo backend of all ranks, by which those of different hosts talk; collective.

    It listens on ``GLOO_SOCKET_IFNAME`` when that is set, else on the address by which this host
    reaches the store.
    """
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed import ProcessGroupGloo as Gloo

    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    address = _address_towards(store)
    if interface:
        device = Gloo.create_device(interface=interface)
    elif address:
        device = Gloo.create_device(hostname=address)
    else:
        device = Gloo.create_default_device()
    options = Gloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
    options._devices = [device]
    options._timeout = timedelta(seconds=timeout_s)
    return Gloo(PrefixStore("wire", store), rank, world_size, options)


def _address_towards(store: Any) -> str | None:
    """This host's address on the way to a TCPStore's server; None for other stores."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not hasattr(store, "host"):
        return None
    family, kind, protocol, _, target = socket.getaddrinfo(
        store.host, store.port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])
