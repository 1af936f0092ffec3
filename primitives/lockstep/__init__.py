"""pytest plugin: tests that run on several ranks at once, with one outcome per test.

    pytest -p primitives.lockstep --ranks 4 tests              # ranks forked by pytest itself
    mpirun -n 4 pytest -p primitives.lockstep tests            # one pytest session per rank
    torchrun --nproc-per-node 4 -m pytest -p primitives.lockstep tests

A test that takes the fixture ``world`` or ``rank``, or is marked ``ranks``, runs on all ranks. With
``--ranks`` every other test runs in the one parent as usual, and a rank that crashes fails its test
only; under a launcher all ranks run all tests, and a lost rank ends the session. Hypothesis tests
run in lockstep: see [Note: examples in step].

Without ``--ranks`` and a launcher the plugin does nothing but ask for one of them when a test needs
ranks.
"""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # what needs torch is imported only when there are ranks
    import torch.distributed as dist

    from primitives.lockstep.session import RankSession

HOW_TO_RUN = (
    "lockstep: {nodeid} runs on several ranks at once; say how many, or use a launcher:\n"
    "    pytest --ranks 4 ...\n"
    "    mpirun -n 4 pytest ...\n"
    "    torchrun --nproc-per-node 4 -m pytest ..."
)
SESSION = "lockstep session"  # the plugin object of a rank


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lockstep", "tests on several ranks, one outcome per test")
    group.addoption("--ranks", type=int, metavar="N", help="fork N ranks for the tests that need")
    group.addoption("--ranks-backend", default="primitives", help="process group backend")
    group.addoption(
        "--ranks-timeout-s", type=float, default=30.0, help="timeout of a collective, in seconds"
    )
    group.addoption(
        "--ranks-limit-s",
        type=float,
        default=120.0,
        help="limit of a test, or of one hypothesis example, in seconds",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks: runs on all ranks at once (lockstep)")
    if config.option.collectonly or config.option.help:
        return
    from primitives.rendezvous import rank_info

    num_ranks: int | None = config.getoption("--ranks")
    try:
        info = rank_info()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if info is not None:
        if num_ranks not in (None, info.world_size):
            raise pytest.UsageError(f"--ranks {num_ranks}, but {info.world_size} were launched")
        from primitives.lockstep.launcher import LaunchedRank

        config.pluginmanager.register(LaunchedRank(config, info), SESSION)
    elif num_ranks is None:
        config.pluginmanager.register(NoRanks())
    else:
        from primitives.lockstep.parent import Parent

        config.pluginmanager.register(Parent(config, num_ranks))


class NoRanks:
    """Neither ``--ranks`` nor a launcher."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if needs_ranks(item):
                raise pytest.UsageError(HOW_TO_RUN.format(nodeid=item.nodeid))


def needs_ranks(item: pytest.Item) -> bool:
    """Whether a test is marked ``ranks`` or takes a fixture of this file."""
    if item.get_closest_marker("ranks") is not None:
        return True
    fixtures: Any = getattr(item, "_fixtureinfo", None)
    return fixtures is not None and any(
        definition.func.__module__ == __name__
        for definitions in fixtures.name2fixturedefs.values()
        for definition in definitions
    )


def session_of(request: pytest.FixtureRequest) -> "RankSession":
    session: RankSession | None = request.config.pluginmanager.get_plugin(SESSION)
    assert session is not None, "a test that needs ranks runs on ranks only"
    return session


@pytest.fixture
def world(request: pytest.FixtureRequest) -> "dist.ProcessGroup":
    """The process group of all ranks, also torch.distributed's default one."""
    return session_of(request).world()


@pytest.fixture(scope="session")
def rank(request: pytest.FixtureRequest) -> int:
    """This rank."""
    return session_of(request).info.rank
