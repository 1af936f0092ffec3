"""The one collective: every rank's quads, with what lets all ranks refuse bad input together.

A message is a header of four int64 and the quads [tokens, 4] of the rank's columns, as float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from primitives import _C
from primitives.collectives import all_gather_flat

HEADER = 8
"""float32 elements: vocab_size, position of the first bad label or -1, that label, 0."""


@dataclass(frozen=True)
class Ranks:
    """This rank among those that share the vocabulary."""

    group: dist.ProcessGroup | None

    @staticmethod
    def named(group_name: str) -> "Ranks":
        """The group of this name; none for an empty one."""
        if not group_name:
            return Ranks(None)
        c10d: Any = dist.distributed_c10d  # as functional collectives find their group
        return Ranks(c10d._resolve_process_group(group_name))

    @property
    def rank(self) -> int:
        """In the group."""
        return 0 if self.group is None else self.group.rank()

    @property
    def num_ranks(self) -> int:
        """Of the group."""
        return 1 if self.group is None else self.group.size()


def new_message(num_tokens: int, device: torch.device) -> Tensor:
    """A message to fill: [HEADER + 4 * num_tokens]."""
    return torch.empty(HEADER + 4 * num_tokens, dtype=torch.float32, device=device)


def refuse_capture(device: torch.device) -> None:
    """Raises ValueError while a CUDA graph is captured: the host cannot read headers then."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError("check_input: expected False while a CUDA graph is captured, got True")


def quads_of(message: Tensor) -> Tensor:
    """The quads in a message: [tokens, 4]; or of all ranks: [ranks, tokens, 4]."""
    num_tokens = (message.shape[-1] - HEADER) // 4
    return message[..., HEADER:].view(*message.shape[:-1], num_tokens, 4)


def write_header(
    message: Tensor, labels: Tensor | None, vocab_size: int, ignore_index: int
) -> None:
    """Says which vocabulary the quads are of, and which label (of [tokens]) lies outside it."""
    if message.device.type == "cpu":
        _C.vocab_entropy_write_header(message, labels, vocab_size, ignore_index)
    else:
        write_header_on_device(message, labels, vocab_size, ignore_index)


def write_header_on_device(
    message: Tensor, labels: Tensor | None, vocab_size: int, ignore_index: int
) -> None:
    """The same by torch, where labels are not at hand; waits for the device."""
    position, label = -1, 0
    if labels is not None:
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
        if bool(bad.any()):
            position = int(bad.int().argmax())
            label = int(labels[position])
    header = torch.tensor([vocab_size, position, label, 0])
    message[:HEADER].view(torch.int64).copy_(header)


def exchange(message: Tensor, ranks: Ranks) -> Tensor:
    """All messages, [num_ranks, HEADER + 4 * tokens]."""
    if ranks.group is None:
        return message[None]
    messages = message.new_empty(ranks.num_ranks, message.numel())
    all_gather_flat(messages.view(-1), message, group=ranks.group)
    return messages


def check_headers(messages: Tensor, labels_shape: tuple[int, ...]) -> None:
    """Reads the headers of all ranks, and waits for a device to do so.

    Raises:
        ValueError: the same on every rank: a rank has a label outside the vocabulary, or another
            vocabulary.
    """
    headers = messages.view(torch.int64)[:, : HEADER // 2].tolist()
    vocab_size = headers[0][0]
    for rank, (theirs, _, _, _) in enumerate(headers):
        if theirs != vocab_size:
            raise ValueError(
                f"vocab_size: rank 0 has {vocab_size}, rank {rank} has {theirs}; expected one size"
            )
    for rank, (_, position, label, _) in enumerate(headers):
        if position >= 0:
            index = torch.unravel_index(torch.tensor(position), labels_shape)
            where = ", ".join(str(int(i)) for i in index)
            raise ValueError(
                f"labels: expected 0 <= label < {vocab_size} or ignore_index, got {label} "
                f"at [{where}] on rank {rank}"
            )
