"""What the ranks of test_gpu_backend.py do: processes of one group, all on the same GPU."""

import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_cases import MOVED, OPS, REDUCED
from device_fused_cases import numbers
from ranks import init
from test_backend_bits import assert_bits, draw
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import primitives
from primitives import collectives, vocab_parallel
from primitives.backend import native
from primitives.errors import CollectiveError, CollectiveMismatch
from special_distributed.exact_training import (
    assert_same_tensors,
    batch,
    loss,
    mlp,
    sgd,
    train_alone,
)
from special_distributed.test_model_parallel import (
    NUM_MICROBATCHES,
    Stage,
    integers,
    weighted_sum,
)

CUDA = torch.device("cuda", 0)
NUM_STEPS = 3
NUMELS = (*(0, 1, 3, 60, 511, 1500, 4096) * 3, 16_385, 40_001, 300_001)


def start(timeout_s: float = 120.0) -> tuple[int, int]:
    """Joins the group, as if on the host that TEST_HOSTS names by a letter; rank and world size."""
    torch.cuda.set_device(CUDA)
    if hosts := os.environ.get("TEST_HOSTS"):
        os.environ["PRIMITIVES_HOST_ID"] = hosts[int(os.environ["TEST_RANK"])]
    return init(timeout_s)


def laid(x: Tensor, device: torch.device, offset: int, stride: int) -> Tensor:
    """A copy of flat ``x`` that begins ``offset`` elements after an aligned place."""
    numel = offset + x.numel() * stride + 1
    room = torch.zeros(numel * x.itemsize, dtype=torch.uint8, device=device).view(x.dtype)
    view = room[offset : offset + x.numel() * stride : stride]
    if stride == 1:  # some types can only be moved as bytes
        view.view(torch.uint8).copy_(x.view(torch.uint8))
    else:
        view.copy_(x)
    return view


def play(op: str, xs: list[Tensor], outs: list[Tensor], root: int, reduce_op: Any) -> list[Tensor]:
    """One collective of this rank on tensors of any device; what it must have written."""
    n = len(xs)
    if op == "all_reduce":
        dist.all_reduce(xs[0], reduce_op)
        return [xs[0]]
    if op == "reduce":
        dist.reduce(xs[0], root, reduce_op)
        return [xs[0]]
    if op == "broadcast":
        dist.broadcast(xs[0], root)
        return [xs[0]]
    if op == "reduce_scatter":
        dist.reduce_scatter_tensor(outs[0], torch.cat(xs), reduce_op)
        return outs[:1]
    if op == "all_gather":
        full = torch.empty(n * xs[0].numel(), dtype=xs[0].dtype, device=xs[0].device)
        dist.all_gather_into_tensor(full, xs[0])
        return [full]
    if op == "all_gather_list":
        dist.all_gather(outs, xs[0])
        return outs
    if op == "all_to_all":
        dist.all_to_all(outs, xs)
        return outs
    mine = dist.get_rank() == root
    if op == "gather":
        dist.gather(xs[0], outs if mine else None, root)
        return outs if mine else []
    assert op == "scatter", op
    dist.scatter(outs[0], xs if mine else None, root)
    assert n == dist.get_world_size()
    return outs[:1]


REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter")
MOVES = ("broadcast", "all_gather", "all_gather_list", "all_to_all", "gather", "scatter")


def bits_of_the_cpu(num_cases: str, seed: str) -> None:
    """Random collectives on the GPU and on the CPU, in the same group: equal bits."""
    rank, n = start()
    drawn = random.Random(int(seed))  # equal on all ranks
    for case in range(int(num_cases)):
        op = drawn.choice(REDUCTIONS + MOVES)
        dtype, name = drawn.choice(REDUCED)
        if op in MOVES:
            dtype = drawn.choice(MOVED)
        numel, root = drawn.choice(NUMELS), drawn.randrange(n)
        offset, stride = drawn.randrange(16), drawn.choice([1, 1, 1, 2])
        seeds = [1000 * case + n * rank + r for r in range(n)]
        if dtype in dict(REDUCED):
            values = [draw((numel,), dtype, s) for s in seeds]
        else:
            values = [draw((numel * dtype.itemsize,), torch.uint8, s).view(dtype) for s in seeds]
            stride = 1
        results = []
        for device in (torch.device("cpu"), CUDA):
            xs = [laid(x, device, offset, stride) for x in values]
            outs = [laid(x, device, offset, stride) for x in reversed(values)]
            found = play(op, xs, outs, root, OPS[name])
            results.append([x.cpu() for x in found])
        for got, want in zip(results[1], results[0], strict=True):
            if dtype in dict(REDUCED):
                assert_bits(got, want)
            else:
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (op, dtype)
    dist.destroy_process_group()


def lists(drawn: random.Random, n: int) -> list[list[int]]:
    """How some tensors are cut over the ranks: numels of the shards."""
    numels = [drawn.choice(NUMELS) for _ in range(drawn.randrange(1, 9))]
    return [[numel // n + drawn.randrange(7) for _ in range(n)] for numel in numels]


def fused_bits_of_the_cpu(num_cases: str, seed: str) -> None:
    """Random lists of tensors on the GPU and on the CPU, in the same group: equal bits."""
    rank, n = start()
    drawn = random.Random(int(seed))  # equal on all ranks
    floats = [torch.float32, torch.float16, torch.bfloat16]
    for case in range(int(num_cases)):
        cut, offset = lists(drawn, n), drawn.randrange(8)
        dtype, target, factor = drawn.choice(floats), drawn.choice(floats), drawn.random()
        gathers, accumulate = drawn.random() < 0.5, drawn.random() < 0.5
        results = []
        fulls, own = [sum(of) for of in cut], [of[rank] for of in cut]
        for device in (torch.device("cpu"), CUDA):
            if gathers:
                ins = [draw((numel,), dtype, case + rank + i) for i, numel in enumerate(own)]
                empty = [torch.zeros(numel, dtype=target) for numel in fulls]
                outs = [laid(x, device, offset, 1) for x in empty]
                collectives.all_gather([laid(x, device, offset, 1) for x in ins], outs, numels=cut)
            else:
                ins = [numbers(numel, dtype, case + 9 * rank + i) for i, numel in enumerate(fulls)]
                held = [numbers(numel, torch.float32, case + i) for i, numel in enumerate(own)]
                outs = [laid(x, device, offset, 1) for x in held]
                squares = torch.empty(len(cut), device=device)
                collectives.reduce_scatter(
                    [laid(x, device, offset, 1) for x in ins],
                    outs,
                    factor=factor,
                    accumulate=accumulate,
                    squares=squares,
                    numels=cut,
                )
                outs.append(squares)
            results.append([x.cpu() for x in outs])
        for got, want in zip(results[1], results[0], strict=True):
            assert_bits(got, want)
    dist.destroy_process_group()


def fused_in_a_graph() -> None:
    """A captured call goes on with its own table, whatever others are called between replays."""
    rank, n = start()
    fulls = [torch.zeros(n * k, device=CUDA, dtype=torch.bfloat16) for k in (5, 700, 30_000)]
    shards = [torch.zeros(len(x) // n, device=CUDA) for x in fulls]
    squares = torch.empty(3, device=CUDA)
    other_full, other_shard = torch.ones(n * 10, device=CUDA), torch.empty(10, device=CUDA)
    collectives.reduce_scatter(fulls, shards, squares=squares)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        collectives.reduce_scatter(fulls, shards, squares=squares)
    for step in range(5):
        for x in fulls:
            x.fill_(step + rank)
        graph.replay()
        want = float(n * step + n * (n - 1) // 2)
        collectives.reduce_scatter([other_full], [other_shard], factor=0.5)
        assert all(float(x.min()) == float(x.max()) == want for x in shards)
        assert float(squares[1]) == 700 * want * want
        assert float(other_shard[9]) == n / 2
    dist.destroy_process_group()


def streams_and_graphs() -> None:
    """The current stream is used; a captured collective is replayed; async works wait by events."""
    rank, n = start()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.zeros(100_000, device=CUDA)
        torch.cuda._sleep(20_000_000)
        x.fill_(rank + 1.0)
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
    work.wait()
    assert float(x[-1]) == n * (n + 1) / 2
    (future,) = work.get_future().wait()
    assert future is x

    x = torch.ones(5_000, device=CUDA)
    dist.all_reduce(x.clone())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        dist.all_reduce(x)
    for step in range(5):
        x.fill_(step + rank)
        graph.replay()
        assert float(x[7]) == n * step + n * (n - 1) / 2
    part = dist.new_group([0, 1])
    if rank < 2:
        y = torch.full((10,), rank + 1.0, device=CUDA)
        dist.all_reduce(y, group=part)
        assert float(y[0]) == 3.0
    dist.barrier()
    dist.destroy_process_group()


def split_vocabulary() -> None:
    """Entropy and log-probability of a rank's columns: the bits of the CPU, errors, a graph."""
    rank, n = start()
    group, columns = dist.group.WORLD, 16 * 100 // n
    labels = torch.randint(n * columns, (64,), generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16):
        logits = draw((64 * columns,), dtype, rank).nan_to_num().clamp(-50, 50).view(64, columns)
        results = []
        for device in (torch.device("cpu"), CUDA):
            leaf = logits.to(device).requires_grad_()
            found = vocab_parallel.entropy_and_log_prob(leaf, labels.to(device), group)
            (grad,) = torch.autograd.grad(found[0].sum() - found[1].sum(), leaf)
            results.append([x.detach().cpu() for x in (*found, grad)])
        for want, got in zip(*results, strict=True):
            assert_bits(got, want)

    on_gpu, bad = leaf.detach(), labels.to(CUDA)
    if rank == 1:
        bad[5] = n * columns
    with pytest.raises(ValueError, match=rf"got {n * columns} at \[5\] on rank 1"):
        vocab_parallel.log_prob(on_gpu, bad, group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(ValueError, match="expected False while a CUDA graph is captured"):
            vocab_parallel.entropy(on_gpu, group)
        captured = vocab_parallel.entropy(on_gpu, group, check_input=False)
    graph.replay()
    assert_bits(captured.cpu(), results[0][0])
    dist.barrier()
    dist.destroy_process_group()


def symmetric() -> None:
    """Tensors in symmetric memory: the bits of the CPU, read in place; streams; graphs."""
    rank, n = start()
    backend = native(None, "symmetric")
    numel = 100_000

    def both(call: Callable[[Tensor, Tensor], Any], given: Tensor, out: Tensor) -> None:
        """On the CPU, and on the device twice, since a call on a new chunk may be staged."""
        wanted, want_out = given.clone(), out.clone()
        call(wanted, want_out)
        for turn in range(2):
            before = backend.num_zero_copy
            tensor = primitives.empty(*given.shape, device=CUDA).copy_(given)
            got_out = out.to(CUDA)
            call(tensor, got_out)
            torch.cuda.synchronize()
            assert_bits(tensor.cpu(), wanted)
            assert_bits(got_out.cpu(), want_out)
            assert turn == 0 or backend.num_zero_copy - before == 1

    for seed in range(5):
        x = draw((numel,), torch.float32, 10 * seed + rank).nan_to_num()
        full = draw((n * numel,), torch.float32, 100 + 10 * seed + rank).nan_to_num()
        gathered, part = torch.zeros(n * numel), torch.zeros(numel)
        both(lambda one, _: dist.all_reduce(one), x, torch.empty(0))
        both(lambda one, _: dist.broadcast(one, n - 1), x, torch.empty(0))
        both(lambda one, out: dist.all_gather_into_tensor(out, one), x, gathered)
        both(lambda one, out: dist.reduce_scatter_tensor(out, one), full, part)
        both(lambda one, out: dist.all_to_all_single(out, one), full, gathered)

    grads = [draw((n * numel,), torch.bfloat16, seed + rank).nan_to_num() for seed in range(3)]
    ins = [backend.allocate_tensor(n * numel, dtype=x.dtype, device=CUDA).copy_(x) for x in grads]
    want = [torch.zeros(numel) for _ in grads]
    collectives.reduce_scatter(grads, want)
    for turn in range(2):
        before = backend.num_zero_copy
        sums = [torch.zeros(numel, device=CUDA) for _ in grads]
        collectives.reduce_scatter(ins, sums)
        shards = [backend.allocate_tensor(numel, dtype=x.dtype, device=CUDA) for x in sums]
        fulls = [torch.zeros(n * numel, device=CUDA) for _ in grads]
        collectives.all_gather([a.copy_(b) for a, b in zip(shards, sums, strict=True)], fulls)
        torch.cuda.synchronize()
        for got, full, right in zip(sums, fulls, want, strict=True):
            assert_bits(got.cpu(), right)
            assert_bits(full[rank * numel :][:numel].cpu(), right)
        assert turn == 0 or backend.num_zero_copy - before == 2

    # What one stream frees is not written by another before the first is done with it.
    streams = [torch.cuda.Stream() for _ in range(2)]
    for step in range(20):
        with torch.cuda.stream(streams[step % 2]):
            late = backend.allocate_tensor(numel, dtype=torch.float32, device=CUDA)
            torch.cuda._sleep(1_000_000 * (step % 2))
            late.fill_(step + rank)
            dist.all_reduce(late)
            assert float(late[-1]) == n * step + n * (n - 1) / 2
            del late

    x = primitives.empty(numel, device=CUDA).zero_()
    graph, before = torch.cuda.CUDAGraph(), backend.num_zero_copy
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        dist.all_reduce(x)
        with pytest.raises(ValueError, match="expected a stream that is not captured"):
            backend.allocate_tensor(4, dtype=torch.float32, device=CUDA)
    for step in range(5):
        x.fill_(step + rank)
        graph.replay()
        assert float(x[7]) == n * step + n * (n - 1) / 2
    assert backend.num_zero_copy - before == 5
    dist.barrier()
    dist.destroy_process_group()


def handed_to_the_host() -> None:
    """On several hosts: said once, ordered by the stream, refused in a graph; the group goes on."""
    rank, n = start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = torch.zeros(100_000, device=CUDA)
            torch.cuda._sleep(20_000_000)
            x.fill_(rank + 1.0)
            work = dist.all_reduce(x, async_op=True)
            assert work is not None
        work.wait()
        assert float(x[-1]) == n * (n + 1) / 2
        dist.all_reduce(x)
    texts = [str(w.message) for w in caught if "handed to the host" in str(w.message)]
    assert len(texts) == (rank == 0), texts
    assert all("its ranks are on several hosts" in text for text in texts)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph), pytest.raises(ValueError, match="a stream that is not captured"):
        dist.all_reduce(x)
    y = torch.ones(10, device=CUDA)
    dist.all_reduce(y[::2])
    assert y.tolist() == [n, 1] * 5
    dist.barrier()
    dist.destroy_process_group()


def train(model: nn.Module, rank: int) -> None:
    optimizer = sgd(model)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss(model, *(x.to(CUDA) for x in batch(step, rank))).backward()
        optimizer.step()


def expected() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in train_alone(NUM_STEPS).named_parameters()}


def clients() -> None:
    """DDP, FSDP1, FSDP2, DTensor and checkpoints: the bits of one process on the CPU."""
    rank, n = start()
    ddp = DistributedDataParallel(mlp(seed=rank).to(CUDA))
    train(ddp, rank)
    assert_same_tensors({k: p.cpu() for k, p in ddp.module.named_parameters()}, expected())

    fsdp1 = FullyShardedDataParallel(
        mlp().to(CUDA),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=CUDA,
        use_orig_params=True,
    )
    train(fsdp1, rank)
    with FullyShardedDataParallel.summon_full_params(fsdp1):
        actual = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone().cpu()
            for name, p in fsdp1.named_parameters()
        }
    assert_same_tensors(actual, expected())

    mesh = init_device_mesh("cuda", (n,))
    for from_group in (False, True):
        fsdp2 = mlp().to(CUDA)
        for layer in (*(m for m in fsdp2 if isinstance(m, nn.Linear)), fsdp2):
            fully_shard(layer, mesh=mesh)
            layer.set_allocate_memory_from_process_group_for_comm(from_group)
        train(fsdp2, rank)
        sharded = dict(fsdp2.named_parameters())
        assert_same_tensors({k: p.full_tensor().cpu() for k, p in sharded.items()}, expected())

    state: dict[str, Any] = {k: p.detach().clone() for k, p in sharded.items()}
    save(state, checkpoint_id=os.environ["TEST_STORE"] + "-checkpoint")
    for value in state.values():
        value.zero_()
    load(state, checkpoint_id=os.environ["TEST_STORE"] + "-checkpoint")
    assert_same_tensors({k: p.full_tensor().cpu() for k, p in state.items()}, expected())

    x = torch.arange(48.0, device=CUDA).view(8, 6)
    product = distribute_tensor(x, mesh, [Shard(1)]) @ distribute_tensor(x.T, mesh, [Shard(0)])
    assert torch.equal(product.redistribute(mesh, [Replicate()]).to_local().cpu(), (x @ x.T).cpu())
    dist.destroy_process_group()


def messages_and_a_pipeline() -> None:
    """Sends and receives, by way of the host; 1F1B over four stages against one process."""
    rank, n = start()
    mine, theirs = torch.full((1000,), float(rank), device=CUDA), torch.empty(1000, device=CUDA)
    left, right = (rank - 1) % n, (rank + 1) % n
    ops = [dist.P2POp(dist.isend, mine, right), dist.P2POp(dist.irecv, theirs, left)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert float(theirs.sum()) == 1000.0 * left

    module = Stage(rank).to(CUDA)
    schedule = Schedule1F1B(
        PipelineStage(module, rank, n, CUDA),
        NUM_MICROBATCHES,
        loss_fn=weighted_sum,
        scale_grads=False,
    )
    x, weights = integers(1), integers(2)
    losses: list[Tensor] = []
    is_last = rank == n - 1
    inputs = [x.to(CUDA)] if rank == 0 else []
    schedule.step(*inputs, **({"target": weights.to(CUDA), "losses": losses} if is_last else {}))
    alone = nn.Sequential(*[Stage(index) for index in range(n)])
    weighted_sum(alone(x), weights).backward()
    grads = [layer.linear.weight.grad for layer in (module, alone[rank])]
    assert torch.equal(grads[0].cpu(), grads[1])
    dist.destroy_process_group()


def fails(call: Callable[[], Any], within_s: float) -> CollectiveError:
    """The error that ``call``, or a later one, raises."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            call()
        except CollectiveError as error:
            return error
        torch.cuda.synchronize()
        time.sleep(0.01)
    raise AssertionError(f"no error within {within_s} s")


def a_dead_rank() -> None:
    """Killed in the middle: the others know who, within the deadline, and end."""
    rank, _ = start()
    x = torch.ones(1000, device=CUDA)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    error = fails(lambda: dist.all_reduce(x), within_s=20)
    assert "rank 1" in str(error), error


def a_rank_that_calls_something_else() -> None:
    rank, _ = start()
    x = torch.ones(1000, device=CUDA)
    dist.all_reduce(x)
    error = fails(lambda: dist.all_reduce(x[: 999 if rank == 2 else 1000]), within_s=20)
    assert isinstance(error, CollectiveMismatch), error
