"""Entropy and log-probability of logits whose vocabulary is split over the ranks of a group.

One pass over the logits, one all_gather of 16 bytes a token, and the same bits for every size of
the group and on AVX-512, AVX2 and plain x86-64. The caller's logits are read, never altered
(unless ``inplace_backward`` asks for it), and nothing of their size is kept or allocated but the
gradient. Definition, errors and limits: docs/canonical-arithmetic.md, "Vocabulary entropy".
"""

from primitives.vocab_parallel.functions import (
    cross_entropy,
    entropy,
    entropy_and_log_prob,
    log_prob,
)
from primitives.vocab_parallel.linear import (
    linear_cross_entropy,
    linear_entropy,
    linear_entropy_and_log_prob,
    linear_log_prob,
)

__all__ = [
    "cross_entropy",
    "entropy",
    "entropy_and_log_prob",
    "linear_cross_entropy",
    "linear_entropy",
    "linear_entropy_and_log_prob",
    "linear_log_prob",
    "log_prob",
]
