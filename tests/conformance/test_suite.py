"""The whole suite against our shims, with fake VMs: the contract's every line that can be seen over a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandshift.conformance.cases import CASES
from sandshift.conformance.runner import FAILED, Suite, select
from sandshift.conformance.table import CELLS, COLUMNS, STATES, sides_of
from tests.conformance.fakes import House, scratch_folder

# One house for all: between two cases the suite itself brings the shims back, which is part of what it is to do.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite() -> AsyncIterator[Suite]:
    with scratch_folder() as folder:
        async with House(Path(folder)) as house:
            yield Suite(house)


LONG = ("notifications keep the newest 64 of progress, and every phase",)
"""More than a few seconds: in the full run only, as the limits are, which are waited for."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            case.name, marks=pytest.mark.full if case.name in LONG or case.name.startswith("limit:") else ()
        )
        for case in select()
    ],
)
async def test_our_shims_hold_the_contract(suite: Suite, name: str) -> None:
    verdict = await suite.try_case(CASES[name])
    if verdict.outcome == "skipped":
        pytest.skip(f"optional: {verdict.reason}")
    assert verdict.outcome != FAILED, verdict.reason


async def test_every_cell_of_the_table_has_a_case_on_every_side_that_meets_it() -> None:
    expected = sum(len(sides_of(state, column)) for state in STATES for column in COLUMNS)
    assert sum(name.startswith("cell ") for name in CASES) == expected
    never = [(state, column) for state in STATES for column in COLUMNS if not sides_of(state, column)]
    assert [CELLS[state][column] for state, column in never] == ["-"] * 3


async def test_every_promise_has_a_case() -> None:
    lines = {case.line for case in CASES.values()}
    assert {f"4.{number}" for number in range(1, 17)} <= lines
