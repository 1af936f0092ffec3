"""The two flat collectives of data parallelism, by whichever name this torch knows them."""

import torch.distributed as dist

# torch 2.13 renamed them and warns about the old names; earlier ones have only those.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(full [n * numel], shard [numel], group=, async_op=): shards in rank order."""
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(shard [numel], full [n * numel], group=, async_op=): sums by the backend's tree over ranks."""
