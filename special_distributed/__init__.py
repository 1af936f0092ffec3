"""Tests that run on four ranks in lockstep; see README.md."""
