"""The way of token rows to their experts and back, over the ranks of ep and etp.

[Note: expert block] The ep * etp ranks that together hold all experts of a layer are neighbours:
rank b of the block has ep rank b // etp and etp rank b % etp. They hold whole tp groups, each with
a microbatch of its own. So rows sorted by (expert, rank in the block, token) are sorted by expert,
then by microbatch, then by token: one expert's rows of one microbatch are a run, tokens ascending,
in every layout.
"""

from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from primitives.arithmetic import kernels
from scenarios.parallel.mesh import Mesh


@dataclass(frozen=True)
class Run:
    """The rows that one expert of this rank gets from one microbatch."""

    expert: int
    """Among this rank's experts."""
    microbatch: int
    """Global index within the step."""
    rows: slice
    """Of what ``Dispatch.to_experts`` returns; may be empty."""


class Dispatch:
    """One layer's plan for one microbatch: who sends how many rows to whom.

    Args:
        experts: [T, k] int64, the experts of this rank's tokens.
        num_experts: E, over all ranks.
        microbatch: global index within the step of the microbatch of these tokens.
        mesh: its ep and etp groups.

    Contract: made and used by all ranks of an expert block together.
    """

    def __init__(self, experts: Tensor, num_experts: int, microbatch: int, mesh: Mesh):
        self._ep, self._etp = mesh.ep, mesh.etp
        ep, etp = self._ep.num_ranks, self._etp.num_ranks
        slots = experts.flatten()
        self._order = torch.argsort(slots, stable=True)  # sorted row -> token * k + choice
        self._topk = experts.shape[1]

        counts = torch.bincount(slots, minlength=num_experts)
        header = torch.cat((counts, counts.new_full((1,), microbatch)))
        # [ep * etp, E + 1]; the plan is made on the host, which needs the numbers anyway.
        headers = self._ep.all_gather(self._etp.all_gather(header[None])).cpu()
        per_rank = num_experts // ep
        first = self._ep.rank * per_rank
        mine = headers[:, first : first + per_rank].view(ep, etp, per_rank)
        self._sent = counts.cpu().view(ep, per_rank).sum(dim=1).tolist()
        self._received = mine[:, self._etp.rank].sum(dim=1).tolist()
        self._columns = mine.sum(dim=(0, 2)).tolist()

        # Rows arrive by (etp rank, ep rank, expert); they are wanted by (expert, ep, etp rank).
        chunk = torch.arange(mine.numel()).view(per_rank, ep, etp).permute(2, 1, 0).flatten()
        sizes = mine.permute(1, 0, 2).flatten()
        sorting = torch.argsort(torch.repeat_interleave(chunk, sizes), stable=True)
        self._sorting = sorting.to(experts.device)
        self._arrival = torch.argsort(sorting).to(experts.device)
        by_expert = mine.flatten(0, 1).t()  # [experts of this rank, ranks of the block]
        self.runs = _runs(by_expert.tolist(), headers[:, -1].tolist())
        stops = by_expert.sum(dim=1).cumsum(0).tolist()
        self.spans = [slice(*ends) for ends in pairwise([0, *stops])]
        """Each expert's rows of all microbatches, in what ``to_experts`` returns."""

    def to_slots(self, by_slot: Tensor) -> Tensor:
        """[T, k, n], a row for every choice -> the same rows sorted by expert, [T * k, n]."""
        return by_slot.flatten(0, 1)[self._order]

    def from_slots(self, rows: Tensor) -> Tensor:
        """[T * k, n] sorted by expert -> [T, k, n]."""
        by_slot = torch.empty_like(rows)
        by_slot[self._order] = rows
        return by_slot.view(-1, self._topk, rows.shape[1])

    def to_experts(self, rows: Tensor) -> Tensor:
        """Sends rows to the ranks that hold their experts.

        Args:
            rows: [T * k, n], sorted by expert.

        Returns:
            [N, n]: all rows for this rank's experts, where ``runs`` says. The etp ranks of an
            expert all get the same.
        """
        rows = self._ep.all_to_all_rows(rows, self._sent, self._received)
        return self._etp.all_gather_rows(rows, self._columns)[self._sorting]

    def from_experts(self, partials: Tensor, dtype: torch.dtype) -> Tensor:
        """Adds the etp ranks' partial sums and sends each row back to where it came from.

        Args:
            partials: [N, n] fp32, where ``runs`` says: this rank's subtree of a sum over parts.
            dtype: of the result.

        Returns:
            [T * k, n], sorted by expert.

        Numerics: the tree over etp ranks in fp32, then one rounding.
        """
        etp, own = self._etp.num_ranks, self._columns[self._etp.rank]
        pieces = self._etp.all_to_all_rows(partials[self._arrival], self._columns, [own] * etp)
        rows = kernels.tree_sum(pieces.view(etp, own, partials.shape[1]), out_dtype=dtype)
        return self._ep.all_to_all_rows(rows, self._received, self._sent)


def _runs(counts: list[list[int]], microbatches: list[int]) -> list[Run]:
    """From [experts][ranks of the block] counts; neighbours of one tp group share a microbatch."""
    runs, start = [], 0
    for expert, by_rank in enumerate(counts):
        pairs = zip(microbatches, by_rank, strict=True)
        for microbatch, group in groupby(pairs, key=lambda pair: pair[0]):
            stop = start + sum(count for _, count in group)
            runs.append(Run(expert, microbatch, slice(start, stop)))
            start = stop
    return runs
