"""Who computes entropy and log-probability: we, torch, and verl and Megatron-LM if installed."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from primitives import vocab_parallel

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""logits [tokens, vocab], labels [tokens] -> entropy, log_prob; NaN for what it does not offer."""


def ours(mode: str, inplace_backward: bool, check_input: bool) -> Function:
    """The gradient in new memory, or in that of the logits."""

    def run(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_parallel.entropy_and_log_prob(
            logits, labels, dist.group.WORLD, inplace_backward=inplace_backward, mode=mode,
            check_input=check_input,
        )  # fmt: skip

    return run


def plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The plain formula."""
    log_probs = logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return entropy, log_probs.gather(-1, labels[:, None])[:, 0]


def verl(functions: Any) -> Function:
    """What verl's Megatron engine calls: the clone keeps the logits that its entropy overwrites."""

    def run(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kept = logits.clone()
        entropy = functions.vocab_parallel_entropy(logits)
        return entropy, functions.vocab_parallel_log_probs_from_logits(kept, labels)

    return run


def megatron(cross_entropy: Any) -> Function:
    """Megatron-LM's cross entropy, which has no entropy and overwrites float32 logits."""

    def run(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log_prob = -cross_entropy(logits.clone(), labels)
        return torch.full_like(log_prob, torch.nan).detach(), log_prob

    return run


def contestants(device: str) -> dict[str, Function]:
    """All that are installed; the process group must exist.

    Ours on a GPU: with its own exp and without waiting for it, and once with the CPU's bits.
    """
    found: dict[str, Function]
    if device == "cuda":
        found = {
            "in place": ours("device", True, False),
            "in place, portable": ours("portable", True, False),
            "out of place": ours("device", False, False),
        }
    else:
        found = {
            "in place": ours("portable", True, True),
            "out of place": ours("portable", False, True),
        }
    found |= {"torch": plain, "torch.compile": torch.compile(plain)}
    if importlib.util.find_spec("megatron") is None:
        return found
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    found["megatron"] = megatron(tensor_parallel.vocab_parallel_cross_entropy)
    package = importlib.util.find_spec("verl")
    if package is not None and package.origin is not None:
        found["verl"] = verl(_verl_functions(Path(package.origin).parent))
    return found


def _verl_functions(package: Path) -> Any:
    """Its one file: importing the package would start with Ray."""
    name = "primitives_bench_verl"
    file = package / "utils" / "megatron" / "tensor_parallel.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
