"""Collectives, canonical kernels and sharded state: the Python face of ``csrc``."""
