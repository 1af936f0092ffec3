"""The losses of a microbatch: means over some of its items, in one order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from primitives.arithmetic import kernels
from primitives.layout import NUM_PARTS


@dataclass(frozen=True)
class Loss:
    """The mean of those ``values`` that count.

    Numerics: the others are +0; the tree over each of ``num_blocks`` equal runs, then over the
    runs, divided by the number of values that count.
    """

    values: Tensor
    """[items] fp32, outside of the autograd graph."""
    counted: Tensor | None = None
    """[items] bool, at least one True; None counts all."""
    num_blocks: int = NUM_PARTS
    """Runs of items; NUM_PARTS of tokens, 1 of samples, which may be fewer."""

    @property
    def num_counted(self) -> int:
        """Items of which this is the mean."""
        return self.values.numel() if self.counted is None else int(self.counted.sum())

    def mean(self) -> Tensor:
        """[] fp32."""
        values = self.values
        if self.counted is not None:
            values = torch.where(self.counted, values, 0.0)
        total = kernels.tree_sum(kernels.token_block_sum(values[:, None], self.num_blocks))
        return (total / total.new_full((), float(self.num_counted))).reshape(())

    def gradient(self, scale: float, num_microbatches: int) -> Tensor:
        """[items] fp32: what backward starts from, for the scaled mean over all microbatches."""
        gradient = torch.full_like(self.values, scale / (self.num_counted * num_microbatches))
        return gradient if self.counted is None else torch.where(self.counted, gradient, 0.0)
