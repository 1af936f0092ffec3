"""Who is measured on the tensors of a device: calls that are launched, and waited for together."""

from functools import partial
from typing import Any

import numpy as np
import torch

from primitives.bench.case import Case, bytes_moved
from primitives.bench.contestants import Bound, C10d, as_tensor, buffers, placed
from primitives.memory import empty


def finish(device: torch.device) -> None:
    """Waits for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DeviceC10d(C10d):
    """A process group of torch.distributed on ordinary or symmetric tensors of a device."""

    def __init__(self, backend: str, device: torch.device, *, symmetric: bool = False) -> None:
        super().__init__(backend)
        self.device = device
        self.empty = partial(empty, symmetric=symmetric, group=self.group)

    def bind(self, case: Case, rank: int) -> Bound | None:
        """As on the CPU; ``send`` and ``recv`` are copies on the host."""
        send, recv = buffers(case, rank)
        source, target = placed(
            case, rank, self._zeros(case.send_numel, case), self._zeros(case.recv_numel, case)
        )

        def load() -> None:
            source.copy_(as_tensor(send, case.dtype))

        def fetch() -> None:
            as_tensor(recv, case.dtype).copy_(target)

        return Bound(
            self.call(case, source, target), send, recv, load, fetch, lambda: finish(self.device)
        )

    def _zeros(self, numel: int, case: Case) -> Any:
        return self.empty(numel, dtype=getattr(torch, case.dtype), device=self.device).zero_()


class DeviceCopy:
    """The limit: all ranks at once copy on the device as many bytes as the operation must move."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def bind(self, case: Case, rank: int) -> Bound | None:
        """A copy that reads and writes this rank's share of bytes_moved()."""
        nbytes = bytes_moved(case.op, case.nbytes, case.world_size) // (2 * case.world_size)
        if nbytes == 0:
            return None
        source = torch.ones(nbytes, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        empty = np.zeros(0, np.uint8)
        return Bound(lambda: target.copy_(source), empty, empty, finish=lambda: finish(self.device))


def contestant_on(device: torch.device, name: str) -> "DeviceC10d | DeviceCopy":
    """Of ``primitives``, on ``symmetric`` memory too, ``nccl`` or another backend, or ``copy``."""
    if name == "copy":
        return DeviceCopy(device)
    if name == "symmetric":
        return DeviceC10d("primitives", device, symmetric=True)
    return DeviceC10d(name, device)
