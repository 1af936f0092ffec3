"""The flight recorder: the last 2048 collectives and messages of this process, always on.

It is dumped into ``PRIMITIVES_FLIGHT_DIR`` when a group fails and on SIGUSR1, also by a process
that is blocked; or by ``dump``. ``testbed flight`` merges the dumps of all ranks.
"""

import json
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (the extension links against it)

from primitives import _C


def snapshot(reason: str = "snapshot") -> dict[str, Any]:
    """What the recorder holds now.

    Args:
        reason: kept as it is, to tell dumps apart.

    Returns:
        ``groups``: for each live group and each of its ranks, the last call (``seq``, ``op``,
        ``site``), whether the rank is still ``inside``, its ``state`` and what it is ``waiting``
        for elsewhere. ``records``: this process's calls, oldest first, times in ns of
        CLOCK_MONOTONIC (comparable between the processes of one host).
    """
    document: dict[str, Any] = json.loads(_C.flight_json(reason))
    return document


def dump(folder: Path | str, reason: str = "dump") -> Path:
    """Writes ``snapshot`` to a file of ``folder``, which is made if need be; gives its path.

    Raises:
        CollectiveError: it cannot be written.
    """
    return Path(_C.dump_flight(str(folder), reason))
