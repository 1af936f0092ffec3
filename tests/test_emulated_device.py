"""The backend on CUDA tensors, on an emulated runtime: kernels, and the way of the host."""

from pathlib import Path

import emulated_bindings
import pytest
import torch
from ranks import ProcessRanks, fetches_descriptors

ONE_HOST, TWO_HOSTS, MIXED_HOSTS = "aaa", "aab", "aba"
UNREACHABLE = {"map": "cannot be mapped: cannot be opened", "export": "cannot be shared"}


@pytest.fixture(scope="module")
def bindings() -> str:
    if reason := emulated_bindings.missing():
        pytest.skip(reason)
    return str(emulated_bindings.build())


@pytest.fixture(params=["ipc", "virtual"])
def memory(request: pytest.FixtureRequest) -> str:
    """PRIMITIVES_CUDA_MEMORY."""
    way: str = request.param
    if way == "virtual" and not fetches_descriptors():
        pytest.skip("this system refuses descriptors of other processes")
    return way


def play(
    folder: Path, bindings: str, name: str, hosts: str, *args: str, memory: str = "ipc"
) -> None:
    ranks = ProcessRanks(
        f"emulated_device_ranks:{name}",
        len(hosts),
        folder,
        (hosts, *args),
        {"TEST_BINDINGS": bindings, "PRIMITIVES_CUDA_MEMORY": memory},
        fresh=True,  # a fork has loaded primitives._C
    ).start()
    results = ranks.wait(240)
    assert [code for code, _ in results] == [0] * len(hosts), "\n".join(out for _, out in results)
    assert ranks.leftovers() == []


def test_kernels_on_one_host(bindings: str, tmp_path: Path, memory: str) -> None:
    play(tmp_path, bindings, "bits_of_the_cpu", ONE_HOST, "", "30", "", memory=memory)


@pytest.mark.parametrize("failing", UNREACHABLE)
def test_devices_that_cannot_map_each_other_go_by_way_of_the_host(
    bindings: str, tmp_path: Path, failing: str, memory: str
) -> None:
    """When one rank of three cannot; and that is said once."""
    said = UNREACHABLE[failing]
    play(tmp_path, bindings, "bits_of_the_cpu", ONE_HOST, failing, "30", said, memory=memory)


@pytest.mark.parametrize("hosts", [TWO_HOSTS, MIXED_HOSTS])
def test_several_hosts_go_by_way_of_the_host(bindings: str, tmp_path: Path, hosts: str) -> None:
    play(tmp_path, bindings, "bits_of_the_cpu", hosts, "", "30", "its ranks are on several hosts")


@pytest.mark.parametrize("hosts", [ONE_HOST, TWO_HOSTS])
@pytest.mark.parametrize("name", ["another_device", "a_mismatch"])
def test_errors(bindings: str, tmp_path: Path, name: str, hosts: str) -> None:
    play(tmp_path, bindings, name, hosts)


def test_symmetric_memory(bindings: str, tmp_path: Path, memory: str) -> None:
    play(tmp_path, bindings, "symmetric", ONE_HOST, memory=memory)


def test_symmetric_memory_is_ordinary_by_way_of_the_host(bindings: str, tmp_path: Path) -> None:
    play(tmp_path, bindings, "symmetric", TWO_HOSTS)


def test_a_copy_that_fails_is_the_failure_of_all(bindings: str, tmp_path: Path) -> None:
    play(tmp_path, bindings, "a_copy_that_fails", ONE_HOST)


def test_another_order_of_the_sum_would_be_found() -> None:
    """The checker of the bits, on what a backend of another order would give."""
    from emulated_device_ranks import bits_equal
    from test_backend_bits import draw

    xs = [draw((4096,), torch.float32, seed).nan_to_num() for seed in range(3)]
    assert not bits_equal((xs[0] + xs[1]) + xs[2], xs[0] + (xs[1] + xs[2]))
    assert bits_equal(xs[0], xs[0].clone())


@pytest.mark.parametrize("hosts", [ONE_HOST, TWO_HOSTS])
@pytest.mark.parametrize("kind", ["Versioned", "Old", "Interface"])
def test_communicator_on_arrays_of_others(
    bindings: str, tmp_path: Path, kind: str, hosts: str
) -> None:
    """By kernels and by way of the host."""
    play(tmp_path, bindings, "communicator", hosts, kind)
