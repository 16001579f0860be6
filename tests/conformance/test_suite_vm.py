"""The suite, unchanged, against real shims with real VMs."""

from __future__ import annotations

import pytest

from sandshift.conformance.runner import FAILED, PASSED, Result, Suite, select
from tests.conformance.real import RealHouse
from tests.needs import needs_root

pytestmark = [pytest.mark.vm, needs_root]
SOME = ("phases", "2691 a whole move", "cell Transferring x Cancel")
"""A fast part of it, for every run with VMs."""


def failures(result: Result) -> list[str]:
    return [str(verdict) for verdict in result.verdicts if verdict.outcome == FAILED]


@pytest.mark.full
@pytest.mark.timeout(2400)
async def test_real_shims_hold_the_contract() -> None:
    async with RealHouse() as house:
        result = await Suite(house).run(select())
    assert failures(result) == []
    assert result.count(PASSED) > 330


@pytest.mark.timeout(600)
async def test_real_shims_hold_a_part_of_it_in_every_run() -> None:
    async with RealHouse() as house:
        result = await Suite(house).run(case for part in SOME for case in select(part))
    assert failures(result) == []
