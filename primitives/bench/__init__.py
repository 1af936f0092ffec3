"""Benchmarks: each prints both sides and the limit from one run. Timing never fails a test."""


class BenchFailed(RuntimeError):
    """A rank of a benchmark ended or hung; the message holds what it last said."""
