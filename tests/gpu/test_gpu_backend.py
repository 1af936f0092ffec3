"""The backend on CUDA tensors: four processes, one GPU."""

from pathlib import Path

import pytest
from ranks import ProcessRanks, fetches_descriptors

from primitives.env import CUDA_MEMORY, PROPERTY_CASES

NUM_RANKS = 4
NUM_CASES = max(1000, int(PROPERTY_CASES.get()))
KILLED = -9
HOSTS = "aabb"
"""As if: ranks of other letters share no memory."""


def play(
    folder: Path, name: str, *args: str, timeout_s: float = 600.0, hosts: str = ""
) -> list[tuple[int, str]]:
    target, env = f"gpu.gpu_backend_ranks:{name}", {"TEST_HOSTS": hosts}
    ranks = ProcessRanks(target, NUM_RANKS, folder, args, env, fresh=True)
    return ranks.start().wait(timeout_s)


def passes(results: list[tuple[int, str]]) -> None:
    assert [code for code, _ in results] == [0] * NUM_RANKS, "\n".join(out for _, out in results)


@pytest.mark.timeout(1800)
def test_the_bits_of_the_cpu(tmp_path: Path) -> None:
    """For every collective and dtype."""
    passes(play(tmp_path, "bits_of_the_cpu", str(NUM_CASES), "0", timeout_s=1700))


@pytest.mark.timeout(1800)
def test_fused_collectives_have_the_bits_of_the_cpu(tmp_path: Path) -> None:
    passes(play(tmp_path, "fused_bits_of_the_cpu", str(NUM_CASES // 5), "0", timeout_s=1700))


def test_memory_of_the_virtual_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which ranks map each other's segments and symmetric memory."""
    if not fetches_descriptors():
        pytest.skip("this system refuses descriptors of other processes")
    monkeypatch.setenv(CUDA_MEMORY.name, "virtual")
    passes(play(tmp_path, "bits_of_the_cpu", "100", "0"))
    passes(play(tmp_path, "symmetric"))


def test_entropy_over_a_split_vocabulary(tmp_path: Path) -> None:
    passes(play(tmp_path, "split_vocabulary"))


def test_fused_collectives_in_a_graph(tmp_path: Path) -> None:
    passes(play(tmp_path, "fused_in_a_graph"))


def test_streams_and_graphs(tmp_path: Path) -> None:
    passes(play(tmp_path, "streams_and_graphs"))


def test_symmetric_memory(tmp_path: Path) -> None:
    passes(play(tmp_path, "symmetric"))


def test_ddp_fsdp_dtensor_and_checkpoints(tmp_path: Path) -> None:
    passes(play(tmp_path, "clients"))


def test_messages_and_a_pipeline(tmp_path: Path) -> None:
    passes(play(tmp_path, "messages_and_a_pipeline"))


def test_a_dead_rank_is_named(tmp_path: Path) -> None:
    results = play(tmp_path, "a_dead_rank")
    assert [code for code, _ in results] == [0, KILLED, 0, 0], results


def test_a_rank_that_calls_something_else_is_a_mismatch(tmp_path: Path) -> None:
    passes(play(tmp_path, "a_rank_that_calls_something_else"))


def test_several_hosts_go_by_way_of_the_host(tmp_path: Path) -> None:
    passes(play(tmp_path, "handed_to_the_host", hosts=HOSTS))


@pytest.mark.timeout(1800)
def test_several_hosts_have_the_bits_of_the_cpu(tmp_path: Path) -> None:
    cases = str(NUM_CASES // 5)
    passes(play(tmp_path, "bits_of_the_cpu", cases, "1", timeout_s=1700, hosts=HOSTS))


def test_fused_collectives_over_several_hosts(tmp_path: Path) -> None:
    passes(play(tmp_path, "fused_bits_of_the_cpu", "50", "1", hosts=HOSTS))


def test_clients_over_several_hosts(tmp_path: Path) -> None:
    passes(play(tmp_path, "clients", hosts=HOSTS))
