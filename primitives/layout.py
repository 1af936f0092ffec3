"""How tensors are cut: the numbers that every layout shares. Imports nothing."""

NUM_PARTS = 8
"""Canonical parts: the finest cut of heads, ffn, vocabulary and tokens; tp divides it."""

NUM_SLICES = 8
"""Slices of one part of a parameter; a data-parallel rank owns NUM_SLICES / dp of each part."""
