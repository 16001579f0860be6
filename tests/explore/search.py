"""Breadth-first search over every state, with a recovery from each."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.explore.facts import Violation, unpack
from tests.explore.rescue import Rescuer
from tests.explore.story import Story, story_of
from tests.explore.world import World

REPORT_EVERY_STATES = 100_000


@dataclass
class Found:
    """What a search has seen."""

    states: int = 0
    transitions: int = 0
    recoveries: int = 0
    calls_max: int = 0
    """Most calls that any recovery needed."""
    cpu_s: float = 0.0
    violations: list[Story] = field(default_factory=list)
    """The shortest history that leads to one; the search ends there."""


def search(
    world: World,
    *,
    destination_refuses: bool = False,
    states_max: int | None = None,
    patience_states: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """Visit every state that can be reached, nearest first, until all are seen or one is wrong.

    Args:
        destination_refuses: in recoveries the destination's VM refuses every start, so that they have to go back.
        states_max: stop there (for tests); None: all.
        patience_states: how much further to look for harm done at once, after a recovery was found to fail.
    """
    began = time.process_time()
    rescuers = [Rescuer(world, cut=cut, destination_refuses=destination_refuses) for cut in (False, True)]
    parents, labels = array("L"), array("L")
    states = [world.first()]
    seen = set(states)
    parents.append(0)
    labels.append(0)
    found = Found()
    position = 0

    def path(last: int, label: int | None = None) -> list[str]:
        told = [] if label is None else [world.labels[label]]
        while last:
            told.append(world.labels[labels[last]])
            last = parents[last]
        return told[::-1]

    while position < len(states) and (states_max is None or position < states_max):
        state = states[position]
        if not found.violations:
            for rescuer in rescuers:
                wrong = rescuer.failure(unpack(state))
                if wrong is not None:
                    found.violations = [story_of(wrong, path(position), rescuer, unpack(state))]
                    states_max = position + patience_states
                    break
        try:
            for label, after in world.successors(state):
                found.transitions += 1
                if after not in seen:
                    seen.add(after)
                    states.append(after)
                    parents.append(position)
                    labels.append(label)
        except Violation as violation:
            found.violations = [Story(violation.what, tuple(path(position, violation.label)))]
            break
        position += 1
        if progress and position % REPORT_EVERY_STATES == 0:
            progress(position)
    found.states = len(states)
    found.recoveries = sum(rescuer.runs for rescuer in rescuers)
    found.calls_max = max(rescuer.calls_max for rescuer in rescuers)
    found.cpu_s = time.process_time() - began
    return found
