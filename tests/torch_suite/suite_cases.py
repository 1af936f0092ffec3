"""The tests of torch's ``distributed_test.py`` that mean something for a CPU backend.

Imported by run.py and, through the fork server, by every rank.

[Note: seen as] The decorators of that file skip by the backend's name: most CPU tests run for
"gloo", those of all_to_all for "mpi" alone. So the file is loaded once under each of these names,
and what its bodies then use is the name of the backend under test.
"""

import importlib.util
import os
import sys
import unittest
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.testing._internal.common_distributed as common

NAME = "primitives"
SOURCE = "torch.testing._internal.distributed.distributed_test"
# A child of the fork server has the server's environment, not its parent's present one.
RANK_ENVIRONMENT = ("TEMP_DIR", "INIT_METHOD", "MASTER_ADDR", "WORLD_SIZE", "BACKEND")


def skip_on_cpu(*decorated: Any, **_: Any) -> Any:
    """In place of decorators that let each rank find out that there are not enough GPUs."""
    skip = unittest.skip("needs GPUs")
    return skip(decorated[0]) if len(decorated) == 1 and callable(decorated[0]) else skip


common.skip_if_no_gpu = skip_on_cpu
common.skip_if_lt_x_gpu = skip_on_cpu
common.nccl_skip_if_lt_x_gpu = skip_on_cpu

monitored_barrier = dist.monitored_barrier


def monitored_barrier_of_any_backend(*args: Any, **kwargs: Any) -> None:
    """torch refuses by the backend's name, before it asks the backend."""
    with mock.patch.object(dist.Backend, "GLOO", NAME):
        monitored_barrier(*args, **kwargs)


dist.monitored_barrier = monitored_barrier_of_any_backend


def load(seen_as: str) -> ModuleType:
    """torch's test file, with decorators that see the backend name ``seen_as``."""
    spec = importlib.util.find_spec(SOURCE)
    assert spec is not None
    assert spec.origin is not None
    name = f"distributed_test_as_{seen_as}"
    spec = importlib.util.spec_from_file_location(name, spec.origin)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    os.environ["BACKEND"] = seen_as
    spec.loader.exec_module(module)
    os.environ["BACKEND"] = module.BACKEND = NAME  # type: ignore[attr-defined]
    return module


def be_a_rank(
    environment: dict[str, str],
    target: Callable[..., None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*args, **kwargs)


class OnForkServer:
    """Starts the ranks of torch's MultiProcessTestCase from a server that has imported all this."""

    def setUp(self) -> None:
        super().setUp()  # type: ignore[misc]
        start = torch.multiprocessing.get_context("forkserver").Process
        environment = {key: os.environ[key] for key in RANK_ENVIRONMENT if key in os.environ}

        def process(
            target: Callable[..., None], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            return start(target=be_a_rank, name=name, args=(environment, target, args, kwargs))

        self._start_processes(process)  # type: ignore[attr-defined]


_gloo, _mpi = load("gloo"), load("mpi")


class SeenAsGloo(OnForkServer, _gloo.TestDistBackend, _gloo.DistributedTest._DistTestBase):
    """What runs for gloo."""


class SeenAsMpi(OnForkServer, _mpi.TestDistBackend, _mpi.DistributedTest._DistTestBase):
    """What runs for MPI; of it only what gloo's names leave out."""


WITHOUT_RANKS = [
    getattr(_gloo, name) for name in dir(_gloo) if name.startswith("TestBucketCapacity")
]


def runnable(case: type[unittest.TestCase]) -> Iterator[unittest.TestCase]:
    """The tests of a class that no decorator skips."""
    for name in unittest.TestLoader().getTestCaseNames(case):
        if not getattr(getattr(case, name), "__unittest_skip__", False):
            yield case(name)


def all_cases() -> dict[str, unittest.TestCase]:
    """Every meaningful test by its name: 118 with ranks and 23 without on torch 2.13."""
    cases: dict[str, unittest.TestCase] = {}
    for case in (SeenAsGloo, SeenAsMpi, *WITHOUT_RANKS):
        for test in runnable(case):
            cases.setdefault(test.id().rpartition(".")[2], test)
    return cases
