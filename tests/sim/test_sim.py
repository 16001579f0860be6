"""A few histories of the simulation, those that ever failed, and what the simulation itself must be able to see."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandshift.session.right import CallMade, Party, RightEvent, Step, handle
from sandshift.session.statement import Cell
from sandshift.session.states import Call
from tests.sim.__main__ import bad_seeds
from tests.sim.history import History, run

HISTORIES = 60
FIRST_SEED = 1_000
TWO_RUNNERS_SEED = 170
"""A history in which the source is asked to run again after it has released the right."""


def told(histories: list[History]) -> str:
    return "\n\n".join(str(history) for history in histories)


def test_in_no_history_two_run_the_guest_and_each_recovers() -> None:
    bad = [history for seed in range(FIRST_SEED, FIRST_SEED + HISTORIES) if (history := run(seed)).violations]
    assert not bad, told(bad)


@pytest.mark.parametrize("seed", bad_seeds())
def test_what_failed_once_holds(seed: int) -> None:
    history = run(seed)
    assert not history.violations, told([history])


@pytest.mark.parametrize("seed", [1, 12, 13])
def test_a_seed_tells_the_same_story_twice(seed: int) -> None:
    first, second = run(seed), run(seed)
    assert first.story == second.story
    assert (first.steps, first.seconds, first.outcome) == (second.steps, second.seconds, second.outcome)


def takes_back_what_it_released(party: Party, event: RightEvent) -> tuple[Party, tuple[Step, ...]]:
    """The protocol without the guard that a source which has released the right asks before it runs again."""
    resumes = isinstance(event, CallMade) and event.call is Call.RESUME and party.pending is None
    if resumes and party.cell is Cell.RELEASED:
        party = replace(party, record=replace(party.record, cell=Cell.OPEN))
    return handle(party, event)


def test_the_witness_is_not_blind_without_that_guard_a_history_shows_two_runners() -> None:
    history = run(TWO_RUNNERS_SEED, protocol=takes_back_what_it_released)
    assert "two runners: destination, source" in history.violations
    assert not run(TWO_RUNNERS_SEED).violations
