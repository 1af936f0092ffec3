"""Checkpoints of sharded state: committed by one rename, verified before a tensor is touched.

[Note: checkpoint layout] A folder ``iter_0000010`` holds one safetensors file per rank that wrote
something, ``index.json`` (every key: global shape, and which file holds which box of it; plain
values) and ``manifest.json`` (size and SHA-256 of every file, and of itself). The keys know
nothing of ranks, so any rank of any world size can load any key. torch.distributed.checkpoint's
protocol for shards (``__create_chunk_list__``) is used; its file format is not, because its
metadata and plain values are pickles and it has no digests.
"""

from primitives.checkpoint.fsdp import FSDPCheckpointManager
from primitives.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager", "FSDPCheckpointManager"]
