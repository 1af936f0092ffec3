"""Positions, masks and rows of an inference step, and sums over its ranks."""

from mutant import Edit, Mutant, Play

FORWARD = "scenarios/inference/forward.py"
ENGINE = "scenarios/inference/engine.py"
S3 = Play("S3", "tp2,pp2", steps=24)

INFERENCE = (
    Mutant(
        "chunk-positions",
        "the positions of a chunk of a prompt begin at 0",
        S3,
        (
            Edit(
                FORWARD,
                "positions += range(segment.start, segment.stop)",
                "positions += range(segment.stop - segment.start)",
            ),
        ),
    ),
    Mutant(
        "inference-mask",
        "a token sees those of its chunk that follow",
        S3,
        (
            Edit(
                FORWARD,
                "hidden = torch.arange(longest) > torch.tensor(queries)[..., None]",
                "hidden = torch.arange(longest) > torch.tensor(queries)[..., None] + longest",
            ),
        ),
    ),
    Mutant(
        "logits-of-the-first-row",
        "a new token is chosen by the logits of its chunk's first row",
        S3,
        (
            Edit(
                ENGINE,
                "rows.append(first_row + segment.stop - 1 - segment.start)",
                "rows.append(first_row)",
            ),
        ),
    ),
)
