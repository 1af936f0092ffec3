"""megatron-core on one CPU process: stand-ins for what it asks of a GPU, taken back afterwards."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode

from scenarios.convert import delta_net

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Run megatron-core here as the only rank of a job.

    Everything that is replaced, in torch and in megatron-core, is as before on leaving; so is the
    absence of a process group.

    Raises:
        ModuleNotFoundError: megatron-core is not installed.
        ValueError: this process belongs to a process group.
    """
    if dist.is_initialized():
        raise ValueError("megatron_on_cpu: this process belongs to a process group already")
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_replaced(torch.cuda, _CUDA))
        from megatron.core import parallel_state
        from megatron.core.ssm import gated_delta_net
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer import multi_latent_attention
        from megatron.core.transformer.moe import moe_utils

        stack.enter_context(_replaced(random, _RANDOM))
        # Without Transformer Engine megatron-core 0.16.1 leaves this name out, and reads it.
        stack.enter_context(_replaced(multi_latent_attention, {"HAVE_TE": False}))
        stack.enter_context(_replaced(moe_utils, {"te_general_gemm": None}))
        stack.enter_context(_replaced(gated_delta_net, delta_net.on_cpu()))
        stack.enter_context(_CudaMeansCpu())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel()
        stack.callback(parallel_state.destroy_model_parallel)
        random.model_parallel_cuda_manual_seed(1)
        yield


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


_CUDA = {
    "current_device": lambda: CPU,
    "get_rng_state": _get_state,
    "set_rng_state": _set_state,
    "manual_seed": _seed,
}
_RANDOM = {"_get_cuda_rng_state": _get_state, "_set_cuda_rng_state": _set_state}


@contextlib.contextmanager
def _replaced(module: ModuleType, names: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name in names:
            if name in before:
                setattr(module, name, before[name])
            else:
                delattr(module, name)
