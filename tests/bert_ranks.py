"""Four ranks that play the cases of test_engine_layouts_bert.py: one start serves all of them."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from primitives import backend
from scenarios.models.bert_microbatch import BertMicrobatch
from scenarios.parallel.losses import Loss
from tests.engine_ranks import NUM_STEPS, Player, play

NUM_RANKS = 4
HOW: dict[str, Any] = {"family": "bert", "precision": "bf16", "lr": 0.003}
LAYOUTS = [
    *("dp1", "tp2", "tp2,sp", "tp4,sp", "pp2", "pp4", "tp2,pp2", "tp2,pp2,sp", "pp2,dp2"),
    *("tp2,dp2,sp,zero0", "dp4", "dp2,zero0"),
]
SAVED = ["dp2", "pp4", "tp4,sp", "tp2,pp2"]
"""Each of them is resumed in every other."""


def see_padding() -> Any:
    """Attention sees the tokens of the padding."""

    def whole(mb: BertMicrobatch, scores: torch.Tensor, _: int) -> torch.Tensor:
        return torch.full((len(scores),), mb.seq_length)

    return mock.patch.object(BertMicrobatch, "_visible", whole)


def count_every_token() -> Any:
    """The mean over the masked tokens is divided by the number of all tokens."""
    everything = property(lambda loss: loss.values.numel())
    return mock.patch.object(Loss, "num_counted", everything)


BUGS = {
    "padding is seen": see_padding,
    "every token counted": count_every_token,
}


def main(folder: str, rank: str) -> None:
    """The life of a rank."""
    torch.set_num_threads(1)
    backend.register()
    player = Player(Path(folder), int(rank), **HOW)
    for layout in LAYOUTS:
        player.train(layout, layout)
    for saved in SAVED:
        player.save(saved)
        for layout in SAVED:
            if layout != saved:
                player.resume(saved, layout)
    for bug, inject in BUGS.items():
        with player.world("dp1") as inside, inject():
            if inside:
                player.write(bug, play(player.trainer("dp1"), NUM_STEPS))
