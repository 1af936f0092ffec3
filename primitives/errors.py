"""Errors of collectives and checkpoints. A caller's wrong argument is a plain ``ValueError``."""


class CollectiveError(RuntimeError):
    """A collective could not complete; the process group it ran on cannot be used any more."""


class CollectiveTimeout(CollectiveError):
    """A deadline passed; the message names the missing ranks and what each of them did last."""


class PeerLost(CollectiveError):
    """Another rank died, left the group or aborted; the message names it and the collective."""


class CollectiveMismatch(CollectiveError):
    """Ranks called different collectives; the message names both sides."""


class RanksOnSeveralHosts(CollectiveError):
    """The ranks of a group that is being created do not share memory."""


class CheckpointCorrupt(RuntimeError):
    """A checkpoint is incomplete or differs from its manifest; the message names the file."""


class CheckpointSaveFailed(RuntimeError):
    """A checkpoint was not committed; the message names rank and file, the earlier ones stay."""
