"""Host memory for the copies that asynchronous saves write from."""

import torch

from primitives.checkpoint.chunks import LocalState

ALIGNMENT_NBYTES = 64


class HostCopy:
    """Copies of a rank's state, in memory that is kept from one save to the next.

    The first touch of fresh memory takes several times as long as the copy, and it is the training
    loop that waits: so only the first save pays for it.
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
            pinned = any(data.is_cuda for _, _, data in items)
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
        for start, (boxes, box, data) in zip(starts, items, strict=True):
            end = start + data.numel() * data.element_size()
            boxes[box] = self._memory[start:end].view(data.dtype).view(data.shape).copy_(data)
