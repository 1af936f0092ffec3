"""Keys of the counter-based generator: named by purpose, so that no layout can shift a stream."""

import hashlib


def random_key(seed: int, *purpose: str | int) -> int:
    """A 63-bit key for ``primitives.canonical``'s Philox streams.

    Args:
        seed: the scenario's seed.
        purpose: what the numbers are for, such as ("dropout", layer, "attention").
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
