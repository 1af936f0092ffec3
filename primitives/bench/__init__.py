"""Benchmarks: each prints both sides and the limit from one run. Timing never fails a test."""
