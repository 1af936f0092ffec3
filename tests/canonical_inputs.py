"""What the bit-for-bit tests draw: sizes of examples, dtypes, and numbers of three families."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)
few = settings(max_examples=25, deadline=None)

SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-40, 6e-8]
SPECIAL += [65504.0, 65520.0, 3.4e38, -3.4e38, 1.17549435e-38]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, family: str = "normal") -> Tensor:
    """Numbers of one family: normal, wide (all exponents) or special (inf, nan, subnormals, -0)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if family == "wide":
        x = x * torch.exp2(torch.randint(-60, 60, shape, generator=generator).float())
    if family == "special":
        pick = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.1, pick, x)
    return x.to(dtype)


families = st.sampled_from(["normal", "wide", "special"])
