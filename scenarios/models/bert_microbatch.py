"""What a BERT microbatch has besides tokens and labels."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from primitives.arithmetic import kernels
from scenarios.data import Batch, BertBatch
from scenarios.parallel.microbatch import Microbatch


@dataclass(frozen=True, kw_only=True)
class BertMicrobatch(Microbatch):
    """Tokens in the order of the model, as in ``Microbatch``; attention sees all but padding."""

    token_types: Tensor
    """[tokens] int64"""
    loss_mask: Tensor
    """[tokens] bool: the tokens that masked-LM predicts."""
    lengths: Tensor
    """[samples] int64: tokens before the padding."""
    swapped: Tensor
    """[samples] int64: the sentence-order label."""

    @classmethod
    def extend(cls, mb: Microbatch, batch: Batch) -> Self:
        """A microbatch with the rest of its ``BertBatch``.

        Raises:
            TypeError: a batch of another family.
        """
        if not isinstance(batch, BertBatch):
            raise TypeError(f"got a {type(batch).__name__}, expected a BertBatch")
        return cls(
            **vars(mb),
            token_types=batch.token_types.t().reshape(-1),
            loss_mask=batch.loss_mask.t().reshape(-1),
            lengths=batch.lengths,
            swapped=batch.swapped,
        )

    def softmax(self, scores: Tensor, heads_per_part: int, scale: float) -> Tensor:
        """Each query sees every token of its sample that is not padding.

        Megatron-LM also hides all keys from padded queries, which no loss and no other token sees.
        """
        return kernels.padded_softmax(scores, self._visible(scores, heads_per_part), scale)

    def softmax_backward(
        self, dprobs: Tensor, probs: Tensor, heads_per_part: int, scale: float
    ) -> Tensor:
        """The gradient of ``softmax``."""
        visible = self._visible(probs, heads_per_part)
        return kernels.padded_softmax_backward(dprobs, probs, visible, scale)

    def _visible(self, scores: Tensor, heads_per_part: int) -> Tensor:
        """[local parts * samples * heads_per_part] int64, in the order of the scores."""
        one_part = self.lengths.repeat_interleave(heads_per_part)
        return one_part.repeat(len(scores) // len(one_part))
