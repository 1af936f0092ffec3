"""The headers that a CUDA file can share: plain floats, no SIMD, the same bits as the kernels."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from canonical_definition import assert_same_bits
from canonical_inputs import SPECIAL
from torch import Tensor

from primitives import canonical

ROOT = Path(__file__).parent.parent
FUNCTIONS = ["exp", "log", "tanh", "erf", "sqrt", "sigmoid", "rsqrt", "gelu", "gelu_erf", "silu"]
DERIVATIVES = ["gelu", "gelu_erf", "silu"]

PROGRAM = """
#include <stdio.h>
#include "canonical/activation.hpp"
#include "canonical/rounding.hpp"
using namespace primitives::canonical;
int main() {
  for (float x; fread(&x, 4, 1, stdin) == 1;) {
    float y[] = {%s};
    for (float& v : y) v = canonical_nan(v);
    fwrite(y, sizeof y, 1, stdout);
  }
}
"""


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    """Inputs [n], and [n, functions + derivatives + 2] from a program of plain floats."""
    folder = tmp_path_factory.mktemp("portable")
    calls = [f"{name}(x)" for name in FUNCTIONS] + [f"{name}_derivative(x)" for name in DERIVATIVES]
    calls += ["float16_to_float(float_to_float16(x))", "bfloat16_to_float(float_to_bfloat16(x))"]
    (folder / "program.cpp").write_text(PROGRAM % ", ".join(calls))
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [os.environ.get("CXX", "c++"), *flags, "program.cpp", "-o", "program"],
        cwd=folder,
        check=True,
    )
    steps = torch.arange(-(2**31), 2**31, 300007, dtype=torch.int64).to(torch.int32)
    x = torch.cat([steps.view(torch.float32), torch.tensor(SPECIAL), torch.linspace(-12, 12, 4001)])
    out = subprocess.run(
        [folder / "program"], input=x.numpy().tobytes(), capture_output=True, check=True
    ).stdout
    return x, torch.from_numpy(np.frombuffer(out, np.float32).copy()).view(x.numel(), -1)


def test_plain_floats_give_the_bits_of_the_kernels(columns: tuple[Tensor, Tensor]) -> None:
    x, got = columns
    ones = torch.ones_like(x)
    expected = [getattr(canonical, name)(x) for name in FUNCTIONS]
    expected += [getattr(canonical, f"{name}_backward")(ones, x) for name in DERIVATIVES]
    for dtype in (torch.float16, torch.bfloat16):
        expected.append(canonical.tree_sum(canonical.tree_sum(x[None], out_dtype=dtype)[None]))
    names = [*FUNCTIONS, *(f"{name}_derivative" for name in DERIVATIVES), "float16", "bfloat16"]
    assert got.shape == (x.numel(), len(names))
    for name, column, bits in zip(names, got.T, expected, strict=True):
        assert_same_bits(column, bits, name)
