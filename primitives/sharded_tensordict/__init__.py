"""A batch whose rows are spread over the ranks of a mesh dimension.

``batch.py`` is what one rank does alone, ``sharded.py`` the container. ``exchange.py`` moves rows
between ranks, after ``schema.py`` has made sure that all ranks agree; ``transport.py`` is what
travels, and its gradients. ``rows.py`` knows dense and jagged tensors, ``columns.py`` Python values
and meta; ``files.py`` saves and loads.
"""

from primitives.sharded_tensordict.columns import equal
from primitives.sharded_tensordict.exchange import Handle
from primitives.sharded_tensordict.sharded import ShardedTensorDict

__all__ = ["Handle", "ShardedTensorDict", "equal"]
