"""Tests of this folder run on exactly four ranks in lockstep: of a launcher, or forked."""

import pytest

from primitives.rendezvous import rank_info

pytest_plugins = ["primitives.lockstep"]
NUM_RANKS = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    try:
        info = rank_info()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if info is None and config.option.ranks is None:
        config.option.ranks = NUM_RANKS
    num_ranks = config.option.ranks if info is None else info.world_size
    if num_ranks != NUM_RANKS:
        raise pytest.UsageError(f"{NUM_RANKS} ranks are needed, got {num_ranks}")
