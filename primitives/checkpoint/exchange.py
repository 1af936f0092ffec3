"""What the ranks of a checkpoint tell each other, so that all of them succeed or all fail."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from primitives.errors import CheckpointCorrupt, CheckpointSaveFailed

T = TypeVar("T")

# An error of these types is raised as the same type on every rank.
SHARED_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (ValueError, FileNotFoundError, CheckpointCorrupt, CheckpointSaveFailed)
}


class Exchange(Protocol):
    """The ranks that save and load together."""

    rank: int
    world_size: int

    def all_gather(self, item: Any) -> list[Any]:
        """Every rank's item, by rank."""


class OneRank:
    """The exchange of a process that is alone."""

    rank = 0
    world_size = 1

    def all_gather(self, item: Any) -> list[Any]:
        return [item]


class GroupExchange:
    """An exchange on a process group.

    [Note: checkpoint group] Beside the default group a new one is made, by all ranks, so that a
    background save disturbs nobody. A sub-group is used as it is: torch makes a group by a call of
    all ranks of the job, and with ``use_local_synchronization`` names it by how many groups a rank
    is in, so ranks that are in different numbers of groups would wait for each other for ever.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        world = dist.group.WORLD
        assert world is not None
        if process_group is None or process_group is world:
            # The messages are host bytes; a group with a device backend only gets gloo beside it.
            has_cpu = torch.device("cpu") in world._device_types
            self.group = dist.new_group(
                backend=None if has_cpu else "gloo", group_desc="checkpoint"
            )
        else:
            self.group = process_group
        self.rank = dist.get_rank(self.group)
        self.world_size = dist.get_world_size(self.group)

    def all_gather(self, item: Any) -> list[Any]:
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.group)
        return items


def make_exchange(process_group: dist.ProcessGroup | None) -> Exchange:
    """The exchange of a process group, or of this process alone without torch.distributed."""
    if process_group is None and not (dist.is_available() and dist.is_initialized()):
        return OneRank()
    return GroupExchange(process_group)


def agree(
    exchange: Exchange, work: Callable[[], T], io_error: type[Exception] = CheckpointSaveFailed
) -> list[T]:
    """Runs ``work`` on every rank and returns all results; if one rank failed, every rank raises.

    Args:
        exchange: the ranks.
        work: this rank's part; it must not communicate.
        io_error: what an OSError becomes.

    Returns:
        The results, by rank.

    Raises:
        ValueError, CheckpointCorrupt, CheckpointSaveFailed, FileNotFoundError: of the lowest
            failed rank; the message names each failed rank.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    report = None
    if error is not None:
        kind = type(error).__name__
        if isinstance(error, OSError) and kind not in SHARED_ERRORS:
            kind = io_error.__name__
        report = (kind, str(error))
    answers = exchange.all_gather((report, result))
    failed = [(rank, *answer[0]) for rank, answer in enumerate(answers) if answer[0]]
    if not failed:
        return [cast(T, answer[1]) for answer in answers]
    kind = failed[0][1]
    if exchange.world_size == 1:
        text = failed[0][2]
    else:
        text = "; ".join(f"rank {rank}: {message}" for rank, _, message in failed)
    if kind not in SHARED_ERRORS:
        text = f"{kind}: {text}"
    raise SHARED_ERRORS.get(kind, RuntimeError)(text) from error
