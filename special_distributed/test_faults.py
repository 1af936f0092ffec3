"""Faults on the process group: an error within 10 s on every rank, that says who and where.

Rank 0 plays each fault on a job of its own (``testbed faults`` plays the same ones), so the session
itself stays whole.
"""

import pytest

from scenarios.faults.catalogue import CATALOGUE, Fault
from scenarios.faults.play import play, why_not


@pytest.mark.parametrize("fault", CATALOGUE, ids=lambda fault: fault.id)
def test_fault(rank: int, fault: Fault) -> None:
    if skipped := why_not(fault):
        pytest.skip(skipped)
    if rank == 0:
        assert play(fault).complaints == ()
