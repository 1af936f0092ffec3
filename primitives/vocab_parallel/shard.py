"""Which columns of the vocabulary a rank holds."""

from dataclasses import dataclass

NUM_SEGMENTS = 16
"""The vocabulary is cut into so many segments of equal length, the last ones shorter or empty."""


@dataclass(frozen=True)
class Shard:
    """The part of one rank: ``NUM_SEGMENTS / num_ranks`` whole segments."""

    vocab_size: int
    rank: int
    num_ranks: int

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size: expected at least 1 column, got {self.vocab_size}")
        if self.num_ranks < 1 or NUM_SEGMENTS % self.num_ranks:
            raise ValueError(
                f"group: the vocabulary's {NUM_SEGMENTS} segments need 1, 2, 4, 8 or 16 ranks, "
                f"got {self.num_ranks}"
            )

    @property
    def segment_length(self) -> int:
        """Columns of a whole segment."""
        return -(-self.vocab_size // NUM_SEGMENTS)

    @property
    def num_segments(self) -> int:
        """Segments of this rank."""
        return NUM_SEGMENTS // self.num_ranks

    @property
    def first(self) -> int:
        """The first column of the full vocabulary that is this rank's, if it has any."""
        return min(self.vocab_size, self.rank * self.num_segments * self.segment_length)

    @property
    def columns(self) -> int:
        """How many columns this rank has, perhaps none."""
        end = (self.rank + 1) * self.num_segments * self.segment_length
        return min(self.vocab_size, end) - self.first


def shard_of(columns: int, vocab_size: int | None, rank: int, num_ranks: int) -> Shard:
    """The shard of a rank with ``columns`` columns; None: all ranks have as many.

    Raises:
        ValueError: this rank should have another number of columns.
    """
    shard = Shard(columns * num_ranks if vocab_size is None else vocab_size, rank, num_ranks)
    if shard.columns != columns:
        hint = "; give vocab_size, if the ranks hold unequal parts" if vocab_size is None else ""
        raise ValueError(
            f"logits: a vocabulary of {shard.vocab_size} in segments of {shard.segment_length} "
            f"columns puts {shard.columns} on rank {rank} of {num_ranks}, got {columns}{hint}"
        )
    return shard
