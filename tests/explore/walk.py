"""Long random walks beyond the bounds of the search: faults without number, more unread frames.

What is left out of the exhaustive search because it would be too much is sampled here. A walk is repeated by its seed.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from sandshift.session.right import handle
from sandshift.session.states import State
from tests.explore.facts import Bounds, D, Facts, S, Violation, pack, unpack
from tests.explore.rescue import Rescuer
from tests.explore.side import Faults
from tests.explore.story import Story, story_of
from tests.explore.world import Rules, World

BOUNDS = Bounds(crashes=2, deaths=1, refusals=1)
"""Of one event; the walk gives crashes and refusals back after each."""
UNREAD_MAX = 5
STEPS_MAX = 400
RESCUE_EVERY_STEPS = 7


@dataclass
class Walked:
    walks: int = 0
    steps: int = 0
    recoveries: int = 0
    first_seed: int = 0
    violations: list[Story] = field(default_factory=list)
    failing_seeds: list[int] = field(default_factory=list)


def walk_for(seconds: float, first_seed: int) -> Walked:
    """Walk with one seed after the other for so long (CPU seconds)."""
    end = time.process_time() + seconds
    walked = Walked(first_seed=first_seed)
    worlds = [_new_world(deaths) for deaths in (0, 1)]
    seed = first_seed
    while time.process_time() < end:
        walk(worlds[seed % 2], seed, walked)
        seed += 1
    return walked


def replay(seed: int) -> Walked:
    walked = Walked(first_seed=seed)
    walk(_new_world(seed % 2), seed, walked)
    return walked


def _new_world(deaths: int) -> tuple[World, list[Rescuer]]:
    bounds = BOUNDS._replace(deaths=deaths)
    rules = Rules(Faults(bounds.cost, handle, channel_survives_crash=True))
    world = World(bounds, rules, unread_max=UNREAD_MAX, channel_repeats=True)
    return world, [Rescuer(world, cut=False), Rescuer(world, cut=True)]


def walk(world_and_rescuers: tuple[World, list[Rescuer]], seed: int, walked: Walked) -> None:
    """One history: random events until both sessions have ended, with recoveries tried on the way."""
    world, rescuers = world_and_rescuers
    dice = random.Random(seed)
    state, told = world.first(), []
    walked.walks += 1
    for step in range(STEPS_MAX):
        try:
            choices = [(label, after) for label, after in world.successors(state) if after != state]
        except Violation as violation:
            return _failed(walked, seed, Story(violation.what, (*told, world.labels[violation.label])))
        if not choices or _over(world, unpack(state)):
            return None
        label, state = dice.choice(choices)
        state = _refilled(world, state)
        told.append(world.labels[label])
        walked.steps += 1
        if step % RESCUE_EVERY_STEPS == 0:
            walked.recoveries += 2
            for rescuer in rescuers:
                wrong = rescuer.failure(unpack(state))
                if wrong is not None:
                    return _failed(walked, seed, story_of(wrong, told, rescuer, unpack(state)))
    return None


def _failed(walked: Walked, seed: int, story: Story) -> None:
    walked.violations.append(story)
    walked.failing_seeds.append(seed)


def _refilled(world: World, state: int) -> int:
    """Any number of crashes and refusals; VMs die only as often as there are VMs."""
    facts = unpack(state)
    left = world.budget(facts)._replace(crashes=BOUNDS.crashes, refusals=BOUNDS.refusals)
    return pack(facts._replace(budget=world.budget_id(left)))


def _over(world: World, facts: Facts) -> bool:
    return all(
        world.locals[me][number].party.state is State.IDLE
        for me, number in ((S, facts.source), (D, facts.destination))
    )
