"""The paged KV cache: who owns which block, and the keys and values in them."""

from collections.abc import Sequence

import torch
from torch import Tensor


class BlockManager:
    """Free and owned blocks; the lowest free one is given out first, so all ranks agree.

    Args:
        num_blocks: of the cache.
        block_size: tokens of a block.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))

    @property
    def num_in_use(self) -> int:
        """Blocks that somebody owns."""
        return self.num_blocks - len(self._free)

    def num_missing(self, owned: Sequence[int], num_tokens: int) -> int:
        """Blocks that an owner of ``owned`` lacks for its first ``num_tokens``."""
        return max(0, -(-num_tokens // self.block_size) - len(owned))

    def can_grow(self, owned: Sequence[int], num_tokens: int) -> bool:
        """Whether ``grow`` would succeed."""
        return self.num_missing(owned, num_tokens) <= len(self._free)

    def grow(self, owned: list[int], num_tokens: int) -> None:
        """Adds blocks to ``owned`` until it holds ``num_tokens``; the caller asked ``can_grow``."""
        for _ in range(self.num_missing(owned, num_tokens)):
            owned.append(self._free.pop())

    def free(self, owned: list[int]) -> None:
        """Takes all blocks of ``owned`` back.

        Raises:
            ValueError: one of them is free already.
        """
        twice = sorted(set(owned) & set(self._free))
        if twice or len(set(owned)) != len(owned):
            raise ValueError(f"blocks {owned}: {twice or 'some'} would be freed twice")
        self._free = sorted([*self._free, *owned], reverse=True)
        owned.clear()

    def slots(self, owned: Sequence[int], start: int, stop: int) -> list[int]:
        """Where the positions ``start`` to ``stop`` of the owner lie in the cache."""
        size = self.block_size
        return [owned[i // size] * size + i % size for i in range(start, stop)]


class KvCache:
    """Keys and values of this rank's layers and heads, by slot.

    Args:
        num_layers: of this stage.
        num_heads: of this rank.
        num_slots: tokens that fit.
        head_dim: width of a head.
        dtype: of keys and values.

    One more slot, ``empty_slot``, holds zeros: what lies behind the end of a shorter context.
    """

    def __init__(
        self, num_layers: int, num_heads: int, num_slots: int, head_dim: int, dtype: torch.dtype
    ):
        self.empty_slot = num_slots
        shape = (num_layers, num_heads, num_slots + 1, head_dim)
        # Not zeroed: memory is backed when a slot is first written, however large the budget.
        self._keys, self._values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        for cache in (self._keys, self._values):
            cache[:, :, self.empty_slot] = 0

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Puts tokens' [heads, tokens, d] into their slots, [tokens] int64."""
        self._keys[layer].index_copy_(1, slots, keys)
        self._values[layer].index_copy_(1, slots, values)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of slots [n] int64: [heads, n, d] each."""
        keys, values = self._keys[layer], self._values[layer]
        return keys.index_select(1, slots), values.index_select(1, slots)
