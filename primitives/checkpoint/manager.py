"""CheckpointManager: the checkpoints of one run, as a training loop uses them."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from primitives.checkpoint.chunks import LocalState, collect
from primitives.checkpoint.exchange import agree, make_exchange
from primitives.checkpoint.folder import CheckpointRoot
from primitives.checkpoint.host_copy import HostCopy
from primitives.checkpoint.reader import Contents, load_state, read_contents
from primitives.checkpoint.writer import save_state

logger = logging.getLogger(__name__)


class CheckpointManager:
    """Saves and loads the sharded state of all ranks of a process group.

    Constructing it, ``save``, ``load`` and ``delete`` are collective: every rank of the group calls
    them in the same order, and an error on one rank is raised on all. See [Note: checkpoint layout]
    and [Note: commit].

    Args:
        root: folder of the checkpoints, on a file system that all ranks share.
        process_group: the ranks; None for the default group, or for this process alone when
            torch.distributed is not initialised. Beside the default group the manager makes one of
            its own; on a sub-group it talks itself, so there is no asynchronous save. See
            [Note: checkpoint group].
        keep: how many of the checkpoints saved last stay on the disk; None for all.

    Raises:
        ValueError: ``keep`` is not positive.
    """

    def __init__(
        self,
        root: Path,
        *,
        process_group: dist.ProcessGroup | None = None,
        keep: int | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1 or None")
        self.root = CheckpointRoot(Path(root))
        self._keep = keep
        self.exchange = make_exchange(process_group)
        self._on_subgroup = process_group is not None and process_group is not dist.group.WORLD
        self._host_copy = HostCopy()
        self._pending: threading.Thread | None = None
        self._background_error: BaseException | None = None

    def save(self, step: int, state: dict[str, Any], *, asynchronous: bool = False) -> None:
        """Saves one step's checkpoint; it counts only when all of it is on the disk.

        Args:
            step: the step; a checkpoint of the same step is replaced, and stays until the new one
                is complete.
            state: nested dict with str keys of tensors, DTensors, ShardedTensors and plain values
                (None, bool, int, float, str, bytes; lists, tuples, dicts of them). Every rank
                passes its own keys; what several ranks pass under one key must be equal or be
                shards of one tensor.
            asynchronous: copy the state and return; a thread writes it. ``state`` may change at
                once. A process that exits waits for the thread. The manager keeps the memory of
                the copy, as much as this rank saves, for the next time; ``reserve`` gets it early.

        Raises:
            ValueError: the state cannot be stored, ranks contradict each other, or an asynchronous
                save was asked of a sub-group.
            CheckpointSaveFailed: a rank could not write; the message names rank and file.
            Exception: also any error of the asynchronous save before this one.
        """
        if asynchronous:
            self.check_asynchronous()
        self.wait()
        if not asynchronous:
            save_state(
                self.root,
                _checked(step),
                lambda: collect(state),
                self.exchange,
                self._keep,
            )
            return
        staged = self._staged(state)
        self._pending = threading.Thread(
            target=self._save_in_background, args=(_checked(step), staged), name="checkpoint-save"
        )
        self._pending.start()

    def check_asynchronous(self) -> None:
        """Raises ValueError unless this manager can save in the background."""
        if self._on_subgroup:
            # A thread that talks on the caller's group could meet the caller's own collectives.
            raise ValueError("asynchronous: got True on a sub-group, expected the default group")

    def reserve(self, nbytes: int, *, pinned: bool = False) -> None:
        """Makes the memory of asynchronous saves ready in the background; not collective.

        Without it the first asynchronous save gets the memory, and blocks two to three times as
        long as the next ones.

        Args:
            nbytes: about what this rank will save; a save that needs more gets more.
            pinned: page-locked, for tensors on a CUDA device.
        """
        self._host_copy.reserve(nbytes, pinned)

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of host memory that this rank keeps for asynchronous saves."""
        return self._host_copy.nbytes

    def wait(self) -> None:
        """Returns when the pending asynchronous save is on the disk.

        Raises:
            Exception: the error of that save, once.
        """
        if self._pending is not None:
            self._pending.join()
            self._pending = None
        error, self._background_error = self._background_error, None
        if error is not None:
            raise error

    def load(self, state: dict[str, Any], step: int | None = None) -> int:
        """Fills ``state`` in place from a checkpoint whose every byte was verified first.

        Args:
            state: nested dict as in ``save``. Tensors are filled in place, other entries are
                replaced. A rank may ask for any keys, and for other shards than were saved.
            step: which checkpoint; None for the one saved last.

        Returns:
            The step that was loaded.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointCorrupt: a file is missing, foreign or changed; ``state`` is untouched.
            ValueError: a key is missing or its dtype or shape differs; ``state`` is untouched.
        """
        self.wait()
        return load_state(self.root, state, step, self.exchange)

    def latest(self) -> int | None:
        """The step of the checkpoint saved last; None when there is none.

        Raises:
            CheckpointCorrupt: a manifest cannot be read, so the order is not known.
        """
        return self.root.latest()

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        return self.root.steps()

    def contents(self, step: int | None = None) -> Contents:
        """What a checkpoint holds, without reading its tensors; not collective.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointCorrupt: a file is missing, foreign or resized, or the index was changed.
        """
        return read_contents(self.root.existing_folder(step))

    def delete(self, step: int) -> None:
        """Removes the checkpoint of a step; a kill midway leaves no half of it.

        Raises:
            ValueError: there is none.
        """
        self.wait()

        def remove() -> None:
            if self.exchange.rank == 0:
                with self.root.locked():
                    self.root.delete(step)

        agree(self.exchange, remove)

    def _staged(self, state: dict[str, Any]) -> Callable[[], LocalState]:
        """Copies the state now; an error is kept for the save, where all ranks learn of it."""
        try:
            local = collect(state)
            self._host_copy.take(local)
        except Exception as error:
            kept = error

            def fail() -> LocalState:
                raise kept

            return fail
        return lambda: local

    def _save_in_background(self, step: int, staged: Callable[[], LocalState]) -> None:
        try:
            save_state(self.root, step, staged, self.exchange, self._keep)
        except BaseException as error:
            # Raised by wait() or the next save; logged as well, because a run may end before.
            logger.error("asynchronous save of step %d failed: %s", step, error)
            self._background_error = error


def _checked(step: int) -> int:
    if type(step) is not int or step < 0:
        raise ValueError(f"step: got {step!r}, expected an int of at least 0")
    return step
