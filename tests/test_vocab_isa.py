"""tp 1, 2, 4 and 8 on AVX-512, AVX2 and plain x86-64: the same bits, in over 10,000 comparisons."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from test_canonical_isa import supported
from vocab_digest import RANKS

HERE = Path(__file__).parent
Digests = dict[str, list[str]]


def digests_of(isas: Sequence[str]) -> dict[str, Digests]:
    """What vocab_digest.py prints on each instruction set."""
    found: dict[str, Digests] = {}
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    for isa in isas:
        out = subprocess.run(
            [sys.executable, str(HERE / "vocab_digest.py")],
            env=os.environ | {"PRIMITIVES_ISA": isa, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        told = json.loads(out)
        assert told["isa"] == isa
        found[isa] = told["digests"]
    return found


def compare(found: dict[str, Digests]) -> tuple[int, list[str]]:
    """How many digests were compared, and what differs from the first of its kind."""
    num_compared, wrong = 0, []
    first_isa = next(iter(found))
    for isa, digests in found.items():
        if digests.keys() != found[first_isa].keys():
            wrong.append(f"{isa}: other cases than {first_isa}")
            continue
        for key, values in digests.items():
            reference = found[first_isa][key][0]
            ranks = RANKS if len(values) == len(RANKS) else (0,)
            for num_ranks, value in zip(ranks, values, strict=True):
                if isa == first_isa and num_ranks == ranks[0]:
                    continue
                if value != reference:
                    wrong.append(f"{isa}, tp{num_ranks}: {key}")
                num_compared += not key.startswith("inputs")
    return num_compared, wrong


def test_every_tp_and_instruction_set_gives_the_same_bits() -> None:
    found = digests_of(supported()[::-1])
    num_compared, wrong = compare(found)
    assert wrong == []
    assert num_compared > 3_600 * len(found)


def test_one_other_digest_is_found() -> None:
    right = {"forward a": ["1", "1", "1", "1"], "inputs a": ["0"]}
    assert compare({"avx2": right, "scalar": right}) == (7, [])
    other = {"forward a": ["1", "1", "2", "1"], "inputs a": ["0"]}
    assert compare({"avx2": right, "scalar": other})[1] == ["scalar, tp4: forward a"]
    assert compare({"avx2": other})[1] == ["avx2, tp4: forward a"]
    assert compare({"avx2": right, "scalar": {}})[1] == ["scalar: other cases than avx2"]
