"""Eight ranks that play the cases of test_engine_layouts_moe.py: one start serves all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from primitives import backend
from primitives.rank_group import RankGroup
from scenarios.parallel import router
from scenarios.parallel.dispatch import Dispatch, Run
from scenarios.parallel.leaves import ReplicasDiffer
from scenarios.parallel.mesh import Mesh
from tests.engine_ranks import NUM_STEPS, Player, play

NUM_RANKS = 8
HOW: dict[str, Any] = {"family": "moe", "precision": "bf16"}
LAYOUTS = [
    *("dp1", "dp2,ep2", "dp2,etp2", "dp4,ep2,zero0", "dp4,ep2,etp2", "tp2,etp2,sp"),
    *("tp2,dp2,ep4,sp", "tp8,ep4,etp2,sp", "tp4,pp2,ep2,etp2,sp", "pp4,dp2,ep2"),
]
SAVED = ["tp4,pp2,ep2,etp2,sp", "dp2,ep2", "tp2,dp2,ep4,sp", "pp2,dp2,etp2,zero0"]
"""Each of them is resumed in every other."""


def skip_sum_over_etp() -> Any:
    """An expert's output is the sum over the parts of one etp rank."""

    def own_part(group: RankGroup, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = right(group, rows, sent, received)
        if len(set(received)) == 1 and group.num_ranks == 2 and rows.dtype == torch.float32:
            out[received[0] :] = 0.0
        return out

    right = RankGroup.all_to_all_rows
    return mock.patch.object(RankGroup, "all_to_all_rows", own_part)


def skip_expert_dp() -> Any:
    """Gradients of experts are not summed over expert_dp: the only group of two that reduces."""

    def keep_own(group: RankGroup, shard: Tensor, full: Tensor, *, async_op: bool) -> Any:
        if group.num_ranks != 2:
            return right(group, shard, full, async_op=async_op)
        shard.copy_(full.view(2, -1)[group.rank])
        return None

    right = RankGroup.reduce_scatter_into
    return mock.patch.object(RankGroup, "reduce_scatter_into", keep_own)


def count_local_tokens() -> Any:
    """Each tp rank balances its own tokens alone."""
    right = router.Router.balance

    def alone(self: router.Router, experts: Tensor, scores: Tensor, mb: Any) -> Any:
        with mock.patch.object(Mesh, "gather_tokens", lambda mesh, x: x.repeat(2, 1, 1)):
            return right(self, experts, scores, mb)

    return mock.patch.object(router.Router, "balance", alone)


def merge_microbatches() -> Any:
    """All rows of an expert go into one product, whichever microbatch they are of."""

    def merged(self: Dispatch, *args: Any) -> None:
        right(self, *args)
        runs: list[Run] = []
        for expert, span in enumerate(self.spans):
            first, *others = [run for run in self.runs if run.expert == expert]
            runs.append(Run(expert, first.microbatch, span))
            empty = slice(span.stop, span.stop)
            runs += [Run(expert, run.microbatch, empty) for run in others]
        self.runs = runs

    right = Dispatch.__init__
    return mock.patch.object(Dispatch, "__init__", merged)


def break_ties_otherwise() -> Any:
    """Of the chosen experts the second gets the first one's weight."""
    right = router.top_k

    def swapped(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        experts, probs = right(logits, k)
        return experts.flip(1), probs

    return mock.patch.object(router, "top_k", swapped)


BUGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "etp sum left out": ("dp2,etp2", skip_sum_over_etp),
    "expert_dp left out": ("dp4,ep2", skip_expert_dp),
    "local tokens balanced": ("tp2,ep2,sp", count_local_tokens),
    "microbatches merged": ("dp2,ep2", merge_microbatches),
    "weights of experts swapped": ("dp1", break_ties_otherwise),
}


def main(folder: str, rank: str) -> None:
    """The life of a rank."""
    torch.set_num_threads(1)
    backend.register()
    player = Player(Path(folder), int(rank), **HOW)
    for layout in LAYOUTS:
        player.train(layout, layout)
    player.train("one bucket per parameter", "dp4,ep2", 1, overlap=False)
    for saved in SAVED:
        player.save(saved)
        for resumed in SAVED:
            if resumed != saved:
                player.resume(saved, resumed)
    for bug, (layout, inject) in BUGS.items():
        with player.world(layout) as inside, inject():
            if inside:
                try:
                    player.write(bug, play(player.trainer(layout), NUM_STEPS))
                except ReplicasDiffer as error:
                    player.write(bug, [{"error": str(error)}])
