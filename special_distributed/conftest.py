"""Tests of this folder run on exactly four ranks in lockstep."""

import pytest

from primitives.rendezvous import rank_info

pytest_plugins = ["special_distributed.lockstep"]
NUM_RANKS = 4


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    info = rank_info()
    if info is not None and info.world_size != NUM_RANKS:
        raise pytest.UsageError(f"{NUM_RANKS} ranks are needed, got {info.world_size}")
