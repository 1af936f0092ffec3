"""Host memory for the copies that asynchronous saves write from."""

import mmap
from contextlib import suppress

import torch

from primitives.checkpoint.chunks import LocalState

ALIGNMENT_NBYTES = 64


class HostCopy:
    """Copies of a rank's state, in memory that is kept from one save to the next.

    The first touch of fresh memory takes several times as long as the copy, and it is the training
    loop that waits: hence memory that was used before, and huge pages for the first time.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, local: LocalState) -> None:
        """Replaces the data of a state by copies, which hold until the next call."""
        items = [
            (tensor.boxes, box, data)
            for tensor in local.tensors.values()
            for box, data in tensor.boxes.items()
        ]
        starts, total = [], 0
        for _, _, data in items:
            starts.append(total)
            total += -(-data.numel() * data.element_size() // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES
        if total > len(self._memory):
            self._memory = _allocate(total, pinned=any(data.is_cuda for _, _, data in items))
        for start, (boxes, box, data) in zip(starts, items, strict=True):
            end = start + data.numel() * data.element_size()
            boxes[box] = self._memory[start:end].view(data.dtype).view(data.shape).copy_(data)


def _allocate(nbytes: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
