"""Collectives, canonical kernels and sharded state: the Python face of ``csrc``."""

from primitives.memory import empty

__all__ = ["empty"]
