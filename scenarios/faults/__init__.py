"""Faults on small jobs: what is done to a rank, and how the others must end."""
