"""AVX-512, AVX2 and baseline x86-64 give the same bits, whatever size, dtype or special value."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = ["scalar", "avx2", "avx512", "avx512_bf16"]


def start(isa: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "canonical_digest.py")],
        env=os.environ
        | {"PRIMITIVES_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def supported() -> list[str]:
    """What this CPU has: everything up to the best, which is what the extension picks by itself."""
    environment = {k: v for k, v in os.environ.items() if k != "PRIMITIVES_ISA"}
    best = subprocess.run(
        [sys.executable, "-c", "import torch; from primitives import _C; print(_C.active_isa())"],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return ORDER[: ORDER.index(best) + 1]


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """The kernels whose digests differ or that only one side ran."""
    return sorted(k for k in a.keys() | b.keys() if k != "isa" and a.get(k) != b.get(k))


def test_every_instruction_set_gives_the_same_bits() -> None:
    digests = {}
    for isa, process in [(isa, start(isa)) for isa in supported()]:
        out, error = process.communicate(timeout=250)
        assert process.returncode == 0, f"{isa}: {error}"
        digests[isa] = json.loads(out)
        assert digests[isa]["isa"] == isa
    for isa, result in digests.items():
        assert len(result) > 40
        assert differing(result, digests["scalar"]) == [], f"{isa} differs from scalar"


def test_one_changed_digest_is_found() -> None:
    assert differing({"isa": "a", "gemm": "1", "exp": "2"}, {"isa": "b", "gemm": "1", "exp": "3"})
    assert differing({"gemm": "1"}, {"gemm": "1", "exp": "3"}) == ["exp"]


def test_an_unknown_instruction_set_is_refused() -> None:
    process = start("sse9")
    _, error = process.communicate(timeout=250)
    assert process.returncode != 0
    assert "PRIMITIVES_ISA=sse9; expected avx512_bf16, avx512, avx2 or scalar" in error
