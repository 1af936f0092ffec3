"""Small training runs, wrapped in every way, and their state, put together without torch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

NUM_TOKENS = 13
# torch's own FSDP1 state dicts are made of what it advises against.
FSDP1_WARNINGS = [
    pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`_get_pg_default_device`:UserWarning"),
]


class Net(nn.Module):
    """Odd shapes, tied weights, a 0-d and an empty parameter and buffer, one without gradient.

    FSDP cuts neither the 0-d nor the empty parameter: both are left whole on every rank.
    """

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, 6)
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 6)
        self.head = nn.Linear(6, NUM_TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("nothing", torch.empty(0, 5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = self.norm(self.first(self.embedding(tokens))).relu()
        logits: torch.Tensor = self.head(self.second(x) * self.scale + self.empty.sum())
        return logits


def fsdp1(net: Net, group: dist.ProcessGroup) -> nn.Module:
    cpu = torch.device("cpu")
    ignored = [net.scale, net.empty]
    net.first = FullyShardedDataParallel(  # type: ignore[assignment]
        net.first, group, device_id=cpu, use_orig_params=True
    )
    return FullyShardedDataParallel(
        net, group, device_id=cpu, use_orig_params=True, ignored_states=ignored
    )


def fsdp2(net: Net, group: dist.ProcessGroup) -> nn.Module:
    return _fully_shard(net, DeviceMesh.from_group(group, "cpu"))


def hsdp(net: Net, group: dist.ProcessGroup) -> nn.Module:
    return _fully_shard(net, init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner")))


def _fully_shard(net: Net, mesh: DeviceMesh) -> nn.Module:
    fully_shard(net.first, mesh=mesh)
    return fully_shard(net, mesh=mesh, ignored_params={net.scale, net.empty})


def ddp(net: Net, group: dist.ProcessGroup) -> nn.Module:
    return DistributedDataParallel(net, process_group=group, find_unused_parameters=True)


def plain(net: Net, group: dist.ProcessGroup) -> nn.Module:
    return net


Wrap = Callable[[Net, dist.ProcessGroup], nn.Module]


def make_optimizer(model: nn.Module, *, swap: bool = False) -> torch.optim.AdamW:
    """Two groups: weights decay, the rest does not."""
    decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decays[name.endswith("weight") and "norm" not in name].append(parameter)
    groups = [
        {"params": decays[True], "weight_decay": 0.1},
        {"params": decays[False], "weight_decay": 0.0, "lr": 3e-3},
    ]
    return torch.optim.AdamW(groups[::-1] if swap else groups, lr=1e-2)


class Run(NamedTuple):
    """A training run on this rank; all ranks train on the same batches."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def update(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens, targets = torch.randint(NUM_TOKENS, (2, 8), generator=generator)
        nn.functional.cross_entropy(self.model(tokens), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def full(self, group: dist.ProcessGroup) -> dict[str, Any]:
        """Parameters, buffers and moments, unsharded here, and every parameter's settings."""
        full: dict[str, Any] = {"model": {}, "moments": {}, "settings": {}}
        for name, parameter in self.model.named_parameters():
            clean = name.replace("_fsdp_wrapped_module.", "").replace("module.", "")
            shape = Net().get_parameter(clean).shape
            full["model"][clean] = _whole(parameter.detach(), shape, group)
            kinds = self.optimizer.state.get(parameter, {})
            for kind in ("exp_avg", "exp_avg_sq"):
                if kind not in kinds and isinstance(parameter, DTensor):
                    continue
                held = kinds[kind] if kind in kinds else torch.empty(0)
                if (whole := _whole(held, shape, group)) is not None:
                    full["moments"].setdefault(clean, {})[kind] = whole
            steps: list[Any] = [None] * group.size()
            dist.all_gather_object(steps, kinds.get("step"), group=group)
            if found := [step for step in steps if step is not None]:
                assert all(step == found[0] for step in found)
                full["moments"][clean]["step"] = found[0]
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for settings in self.optimizer.param_groups:
            for parameter in settings["params"]:
                clean = names[parameter].replace("_fsdp_wrapped_module.", "").replace("module.", "")
                full["settings"][clean] = {key: settings[key] for key in ("lr", "weight_decay")}
        for name, buffer in self.model.named_buffers():
            clean = name.replace("_fsdp_wrapped_module.", "").replace("module.", "")
            full["model"][clean] = buffer.clone()
        return full


def _whole(shard: torch.Tensor, shape: torch.Size, group: dist.ProcessGroup) -> torch.Tensor | None:
    """The tensor of which every rank holds a shard; None if no rank holds any."""
    if isinstance(shard, DTensor):
        return shard.full_tensor().clone()
    pieces: list[Any] = [None] * group.size()
    dist.all_gather_object(pieces, shard, group=group)  # FSDP1: a run of elements on each rank
    if shard.shape == shape and all(piece.shape == shape for piece in pieces):
        return shard.clone()
    if sum(piece.numel() for piece in pieces) != shape.numel():
        return None
    return torch.cat([piece.flatten() for piece in pieces]).reshape(shape)


def make_run(wrap: Wrap, group: dist.ProcessGroup, seed: int, *, swap: bool = False) -> Run:
    torch.manual_seed(seed)
    model = wrap(Net(), group)
    return Run(model, make_optimizer(model, swap=swap))


def reference_step(state: dict[str, Any], seed: int, alone: dist.ProcessGroup) -> dict[str, Any]:
    """A step from an unsharded state in one process, by torch alone."""
    net = Net()
    net.load_state_dict(state["model"] | {"head.weight": state["model"]["embedding.weight"]})
    run = Run(net, make_optimizer(net))
    for name, parameter in net.named_parameters():
        if name in state["moments"]:
            kinds = state["moments"][name]
            run.optimizer.state[parameter] = {kind: kinds[kind].clone() for kind in kinds}
    run.update(seed)
    return run.full(alone)


def name_of(value: Any) -> str:
    """What pytest calls a parameter."""
    return value.__name__ if callable(value) else str(value)


def assert_same_bits(got: Any, expected: Any, where: str = "state") -> None:
    """Compares nested states; floats as bits, so that -0.0 and NaN payloads count."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for name in expected:
            assert_same_bits(got[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, torch.Tensor):
        if hasattr(expected, "to_local"):
            got, expected = got.to_local(), expected.to_local()
        assert got.dtype == expected.dtype, where
        assert got.shape == expected.shape, where
        same = got.reshape(-1).view(torch.uint8) == expected.reshape(-1).view(torch.uint8)
        assert same.all(), f"{where}: {int((~same).sum())} bytes differ"
    else:
        assert repr(got) == repr(expected), where
