"""The suite bites: a sample of mutants in every run, all of them in the full one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandshift.conformance.cases import CASES
from sandshift.conformance.table import COLUMNS, STATES, sides_of
from tests.conformance import mutants
from tests.conformance.fakes import House, scratch_folder
from tests.conformance.mutant import CASE_S, MUTANTS, Mutant, caught_by

SAMPLE = 12
"""Every so many mutants of the table one is tried in the fast run; of the others all that are quick are."""


async def survivors(some: list[Mutant]) -> list[str]:
    with scratch_folder() as folder:
        async with House(Path(folder)) as house:
            return [one.name for one in some if not await caught_by(one, house)]


async def test_a_sample_of_mutants_is_caught() -> None:
    quick = [one for one in mutants.everyone() if one.case_s == CASE_S]
    assert await survivors(quick[::SAMPLE]) == []


@pytest.mark.full
@pytest.mark.timeout(1800)
async def test_every_mutant_is_caught() -> None:
    assert await survivors(mutants.everyone()) == []


def test_every_cell_that_can_be_met_has_a_mutant_and_every_mutant_names_real_cases() -> None:
    met = [(s, c) for s in STATES for c in COLUMNS if sides_of(s, c)]
    assert len(list(mutants.cells())) == len(met)
    named = {name for mutant in mutants.everyone() for name in mutant.cases}
    assert named <= set(CASES)


def test_every_promise_has_a_mutant() -> None:
    about = {mutant.about for mutant in MUTANTS}
    assert {f"4.{number}" for number in range(1, 17)} <= about
