"""What the ranks of test_gpu_communicator.py do: the Communicator on memory of one GPU."""

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from collective_cases import REDUCED
from test_backend_bits import assert_bits, draw
from torch import Tensor
from torch.distributed import FileStore

from primitives import reference
from primitives.communicator import Communicator

CUDA = torch.device("cuda", 0)

TREE = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(float x, float* out) { *out = x; }
__device__ void narrow(float x, __half* out) { *out = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

// out[i] = the sum of xs[r, i] over r by adjacent pairs, an odd last one carried up.
template <class T>
__device__ void tree(const T* xs, T* out, int n, long long numel) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= numel) return;
  float level[16];
  for (int r = 0; r < n; r++) level[r] = widen(xs[r * numel + i]);
  for (int width = n; width > 1; width = (width + 1) / 2) {
    for (int p = 0; p < width / 2; p++) level[p] = __fadd_rn(level[2 * p], level[2 * p + 1]);
    if (width % 2 == 1) level[width / 2] = level[width - 1];
  }
  narrow(level[0], &out[i]);
}

#define KERNEL(name, T)                                                               \
  extern "C" __global__ void name(const T* xs, T* out, int n, long long numel) { \
    tree(xs, out, n, numel);                                                          \
  }
KERNEL(tree_float32, float)
KERNEL(tree_float16, __half)
KERNEL(tree_bfloat16, __nv_bfloat16)
"""
"""Written apart from the package's kernels: an independent oracle of all_reduce."""


def join() -> Communicator:
    torch.cuda.set_device(CUDA)
    rank, world_size = int(os.environ["TEST_RANK"]), int(os.environ["TEST_WORLD_SIZE"])
    store = FileStore(os.environ["TEST_STORE"], world_size)
    return Communicator(store, rank, world_size, timeout_s=120)


def surface(comm: Communicator, make: Callable[[Any], Any], **options: Any) -> None:
    """Every operation on what ``make`` makes of a NumPy array; ``.get`` or ``.cpu`` shows it."""
    n, rank = comm.world_size, comm.rank

    def shown(x: Any) -> Any:
        return (x.get() if hasattr(x, "get") else x.cpu().numpy()).tolist()

    full, shard = make(np.zeros(2 * n, np.int64)), make(np.full(2, rank))
    comm.all_gather(full, shard, **options)
    assert shown(full) == [r for r in range(n) for _ in range(2)]
    counts = list(range(n))
    uneven = make(np.zeros(sum(counts), np.float32))
    comm.all_gather(uneven, make(np.full(rank, rank, np.float32)), counts=counts, **options)
    assert shown(uneven) == [r for r in range(n) for _ in range(r)]
    summed = make(np.zeros(2, np.float32))
    comm.reduce_scatter(summed, make(np.arange(2 * n, dtype=np.float32)), **options)
    assert shown(summed) == [n * 2 * rank, n * (2 * rank + 1)]
    whole = make(np.full(1000, rank + 1.0))
    comm.all_reduce(whole, "max", **options)
    assert shown(whole) == [n] * 1000
    received = make(np.zeros(n, np.int32))
    comm.all_to_all(received, make(np.arange(n, dtype=np.int32) + 10 * rank), **options)
    assert shown(received) == [10 * r + rank for r in range(n)]
    data = make(np.arange(3) * (rank == 1))
    comm.broadcast(data, 1, **options)
    assert shown(data) == [0, 1, 2]
    rooted = make(np.full(3, 2.0))
    comm.reduce(rooted, n - 1, **options)
    assert shown(rooted) == [2.0 * n if rank == n - 1 else 2.0] * 3
    gathered = make(np.zeros(2 * n, np.int64)) if rank == 0 else None
    comm.gather(gathered, shard, **options)
    assert gathered is None or shown(gathered) == [r for r in range(n) for _ in range(2)]
    part = make(np.zeros(2, np.int64))
    comm.scatter(part, make(np.arange(2 * n)) if rank == 0 else None, **options)
    assert shown(part) == [2 * rank, 2 * rank + 1]
    if rank == 0:
        comm.send(make(np.arange(5)), 1, tag=3, **options)
    elif rank == 1:
        got = make(np.zeros(5, np.int64))
        assert comm.recv(got, tag=3, **options) == 0
        assert shown(got) == list(range(5))
    comm.barrier()


def torch_tensors() -> None:
    """Every operation, without and with a stream; random sums have the bits of the definition."""
    with join() as comm:
        surface(comm, lambda x: torch.from_numpy(x).to(CUDA))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            surface(comm, lambda x: torch.from_numpy(x).to(CUDA), stream=stream.cuda_stream)
            x = torch.zeros(100_000, device=CUDA)
            torch.cuda._sleep(20_000_000)
            x.fill_(comm.rank + 1.0)
            comm.all_reduce(x, stream=stream.cuda_stream)
        stream.synchronize()
        assert float(x[-1]) == comm.world_size * (comm.world_size + 1) / 2
        drawn = random.Random(3)
        for case in range(100):
            dtype, op = drawn.choice(REDUCED)
            numel = drawn.choice([1, 60, 4097, 40_001])
            xs = [draw((numel,), dtype, 50 * case + r) for r in range(comm.world_size)]
            data = xs[comm.rank].to(CUDA)
            comm.all_reduce(data, op)
            assert_bits(data.cpu(), reference.all_reduce(xs, op)[0])
        for turn in range(2):  # a call on a new chunk of symmetric memory may be staged
            before = comm.num_zero_copy
            x = comm.empty(2, 50_000, device="cuda").fill_(comm.rank + 1)
            comm.all_reduce(x)
            assert float(x[1, -1]) == comm.world_size * (comm.world_size + 1) / 2
            assert turn == 0 or comm.num_zero_copy - before == 1
        with pytest.raises(ValueError, match="expected contiguous memory, got a tensor of shape"):
            comm.all_reduce(torch.zeros(4, 4, device=CUDA).t())
        with pytest.raises(ValueError, match="expected memory on cuda:0, got cpu"):
            comm.all_gather(torch.zeros(8), torch.zeros(2, device=CUDA))
        comm.barrier()


def cupy_arrays() -> None:
    """Every operation on CuPy arrays; all_reduce against a kernel of the test's own."""
    import cupy

    with join() as comm:
        surface(comm, cupy.asarray)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            surface(comm, cupy.asarray, stream=stream.ptr)
        shown = cupy.asarray(comm.empty(50_000, device="cuda"))
        shown[:] = comm.rank + 1
        comm.all_reduce(shown)
        assert float(shown[-1]) == comm.world_size * (comm.world_size + 1) / 2
        module = cupy.RawModule(code=TREE, options=("-std=c++17",))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for numel in (1, 513, 100_003):
                compare_with_own_kernel(comm, cupy, module, dtype, numel)
        comm.barrier()


def compare_with_own_kernel(
    comm: Communicator, cupy: Any, module: Any, dtype: torch.dtype, numel: int
) -> None:
    n = comm.world_size
    xs = torch.stack([draw((numel,), dtype, 9 * r + numel).nan_to_num() for r in range(n)])
    name = str(dtype).removeprefix("torch.")
    held = cupy.asarray(xs.view(torch.uint8).numpy())  # [n, numel * itemsize]
    expected = cupy.empty(numel * dtype.itemsize, cupy.uint8)
    blocks = ((numel + 255) // 256,)
    arguments = (held, expected, np.int32(n), np.int64(numel))
    module.get_function(f"tree_{name}")(blocks, (256,), arguments)
    own = held[comm.rank].copy()
    typed: Tensor = torch.from_dlpack(own).view(dtype)  # CuPy has no bfloat16 of its own
    comm.all_reduce(own.view(name) if dtype != torch.bfloat16 else typed)
    assert own.get().tolist() == expected.get().tolist(), (dtype, numel)
    assert n <= 16
