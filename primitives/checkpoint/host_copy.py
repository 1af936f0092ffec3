"""Host memory for the copies that asynchronous saves write from."""

import mmap
import threading

import torch

from primitives.checkpoint.chunks import LocalState

ALIGNMENT_NBYTES = 64


class HostCopy:
    """Copies of a rank's state, in memory that is kept from one save to the next.

    The first touch of fresh memory takes several times as long as the copy, and it is the training
    loop that waits: ``reserve`` has a thread do it before the first save.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._toucher: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are kept."""
        return len(self._memory)

    def reserve(self, nbytes: int, pinned: bool) -> None:
        """Makes memory ready while the caller goes on; copies that were taken stay."""
        self._wait()
        if self._allocate(nbytes, pinned):  # fresh: touching may overwrite
            self._toucher = threading.Thread(target=self._touch, name="checkpoint-reserve")
            self._toucher.start()

    def take(self, local: LocalState) -> None:
        """Replaces the data of a state by copies, which hold until the next call."""
        self._wait()
        items = [
            (tensor.boxes, box, data)
            for tensor in local.tensors.values()
            for box, data in tensor.boxes.items()
        ]
        nbytes = sum(_aligned_nbytes(data) for _, _, data in items)
        self._allocate(nbytes, pinned=any(data.is_cuda for _, _, data in items))
        start = 0
        for boxes, box, data in items:
            copy = self._memory[start : start + data.nbytes].view(data.dtype).view(data.shape)
            boxes[box] = copy.copy_(data)
            start += _aligned_nbytes(data)

    def _allocate(self, nbytes: int, pinned: bool) -> bool:
        if nbytes <= len(self._memory):
            return False
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return True

    def _wait(self) -> None:
        if self._toucher is not None:
            self._toucher.join()
            self._toucher = None

    def _touch(self) -> None:
        self._memory[:: mmap.PAGESIZE].zero_()


def _aligned_nbytes(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES
