"""The matrix: who dies at which step, and what must come of it by docs/explanation/right-to-run.md.

`promise` is that page as a function of the durable words and of whose VM is left. It knows nothing of how a shim or a
coordinator recovers.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from typing import Final

from sandshift.session.statement import Cell
from sandshift.session.states import Side
from tests.faults.steps import STEPS, Memory, Plan, Step, There


class Victim(enum.Enum):
    SOURCE_SHIM = "source shim"
    DESTINATION_SHIM = "destination shim"
    SOURCE_QEMU = "source QEMU"
    DESTINATION_QEMU = "destination QEMU"
    SOURCE_BOTH = "source shim and QEMU"
    DESTINATION_BOTH = "destination shim and QEMU"
    COORDINATOR = "coordinator"
    CUT = "channel cut"
    SILENCE = "channel silent"


class Promise(enum.Enum):
    """What must come of a case."""

    RUNS = "one runner"
    """The guest runs on exactly one host, with all of its memory, and nobody had to be asked."""
    OPERATOR = "operator"
    """Nobody may know; the guest is kept, paused, for a person to decide."""
    LOST = "lost with its QEMU"
    """The QEMU that was killed was the only one that held the guest: an ordinary crash, told as such."""


SHIMS: Final = (Victim.SOURCE_SHIM, Victim.DESTINATION_SHIM)
_QEMU_OF: Final = {
    Victim.SOURCE_QEMU: Side.SOURCE,
    Victim.SOURCE_BOTH: Side.SOURCE,
    Victim.DESTINATION_QEMU: Side.DESTINATION,
    Victim.DESTINATION_BOTH: Side.DESTINATION,
}
_SHIM_OF: Final = {
    Victim.SOURCE_SHIM: Side.SOURCE,
    Victim.SOURCE_BOTH: Side.SOURCE,
    Victim.DESTINATION_SHIM: Side.DESTINATION,
    Victim.DESTINATION_BOTH: Side.DESTINATION,
}


def loses_qemu(victim: Victim) -> Side | None:
    """The side whose QEMU dies."""
    return _QEMU_OF.get(victim)


def loses_shim(victim: Victim) -> Side | None:
    """The side whose shim dies."""
    return _SHIM_OF.get(victim)


@dataclass(frozen=True, slots=True)
class Case:
    step: Step
    victim: Victim

    @property
    def name(self) -> str:
        return f"{self.step.name}: {self.victim.value}"

    @property
    def promises(self) -> frozenset[Promise]:
        return promise(self.step, self.victim)

    @property
    def by_delete(self) -> bool:
        """A shim that died is brought back by `delete`, as containerd does at once; else by the coordinator, later."""
        return sum(self.name.encode()) % 2 == 0


def promise(step: Step, victim: Victim) -> frozenset[Promise]:
    """What right-to-run.md allows to come of it; more than one only where nobody outside can tell how far QEMU is."""
    match loses_qemu(victim):
        case None:
            return frozenset({Promise.RUNS})
        case Side.SOURCE:
            return _without_source(step, tells=victim is Victim.SOURCE_QEMU)
        case _:
            return _without_destination(step)


def _without_source(step: Step, *, tells: bool) -> frozenset[Promise]:
    """`tells`: its shim lives, and may say over the channel that the guest crashed where it ran."""
    if step.destination in (Cell.HELD, Cell.STARTING, Cell.RUNNING) or step.source in (
        Cell.RELEASED,
        Cell.GONE,
    ):
        return frozenset({Promise.RUNS})  # rule 9: it is GONE, and the destination may have the right
    match step.memory:
        case Memory.PART:
            return frozenset({Promise.LOST})
        case Memory.LAST:
            return frozenset({Promise.LOST, Promise.OPERATOR, Promise.RUNS})
        case Memory.WHOLE:
            # Section 9: "the source's VM died before its shim recorded completed". A destination that has heard its KEPT
            # refuses (section 5); one that has not is kept for a person.
            return frozenset({Promise.OPERATOR, Promise.LOST} if tells else {Promise.OPERATOR})
        case Memory.ABOUT_RECORDED:
            return frozenset({Promise.OPERATOR, Promise.RUNS} | ({Promise.LOST} if tells else set()))
        case Memory.RECORDED:
            return frozenset(
                {Promise.RUNS}
            )  # rule 9: OPEN after completion is GONE, the other copy is the guest


def _without_destination(step: Step) -> frozenset[Promise]:
    if step.source is Cell.GONE:
        return frozenset({Promise.LOST})
    match step.destination:
        case Cell.RUNNING:
            return frozenset({Promise.LOST})
        case Cell.STARTING:
            return frozenset({Promise.OPERATOR})  # LOST: section 9, first row
        case _ if step.held_is_told:
            return frozenset({Promise.RUNS, Promise.LOST})  # section 8: then one VM is all there is
        case _:
            return frozenset({Promise.RUNS})


def applies(step: Step, victim: Victim) -> bool:
    """Whether there is such a victim at that step."""
    match victim:
        case Victim.SOURCE_SHIM:
            return There.SOURCE_SHIM in step.there
        case Victim.DESTINATION_SHIM:
            return There.DESTINATION_SHIM in step.there
        case Victim.SOURCE_QEMU | Victim.SOURCE_BOTH:
            return There.SOURCE_VM in step.there
        case Victim.DESTINATION_QEMU | Victim.DESTINATION_BOTH:
            return There.DESTINATION_VM in step.there
        case Victim.CUT | Victim.SILENCE:
            return There.CHANNEL in step.there and step.source is not Cell.GONE
        case _:
            return True


def _victims(step: Step) -> tuple[Victim, ...]:
    wanted = tuple(Victim) if step.major else SHIMS
    return tuple(
        victim
        for victim in wanted
        if applies(step, victim) and (step.plan is Plan.MOVE or victim is not Victim.COORDINATOR)
    )


CASES: Final = tuple(Case(step, victim) for step in STEPS for victim in _victims(step))


def sample(count: int, seed: int) -> tuple[Case, ...]:
    """So many cases, the same for the same seed: as many different victims and steps as there can be."""
    shuffled = random.Random(seed).sample(CASES, len(CASES))
    chosen: list[Case] = []
    while shuffled and len(chosen) < count:
        victims = {case.victim for case in chosen[len(chosen) // len(Victim) * len(Victim) :]}
        steps = {case.step for case in chosen}
        fresh = [case for case in shuffled if case.victim not in victims and case.step not in steps]
        chosen.append((fresh or shuffled)[0])
        shuffled.remove(chosen[-1])
    return tuple(sorted(chosen, key=CASES.index))
