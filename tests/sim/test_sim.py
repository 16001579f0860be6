"""A few histories of the simulation, those that ever failed, and what the simulation itself must be able to see."""

from __future__ import annotations

import pytest

from tests.sim.__main__ import bad_seeds
from tests.sim.history import History, run

HISTORIES = 60
FIRST_SEED = 1_000


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
