"""What can go wrong in a history, and when."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from random import Random

FAULTS_MAX = 3
STEPS_OF_A_MOVE = 1500
"""About how many turns of the loop a move takes; a fault comes at one of them,"""
SECONDS_OF_A_MOVE = 1.2
"""or at a moment: so the many things that happen at one moment are cut apart too."""
STALLS_S = (0.05, 1.0, 6.0, 40.0)
RESTARTS_S = (0.0, 0.01, 0.2, 3.0)


class Kind(enum.Enum):
    SOURCE_SHIM = "kill the source's shim"
    DESTINATION_SHIM = "kill the destination's shim"
    BOTH_SHIMS = "kill both shims"
    SOURCE_VM = "kill the source's VM"
    DESTINATION_VM = "kill the destination's VM"
    SOURCE_BOTH = "kill shim and VM of the source"
    DESTINATION_BOTH = "kill shim and VM of the destination"
    CUT = "cut the channel"
    SILENT_THERE = "nothing reaches the destination any more"
    SILENT_BACK = "nothing reaches the source any more"
    STALL = "the channel stands still"
    VM_STALL = "the source's VM sends nothing"
    REFUSE_START = "the destination's VM refuses to start"
    REFUSE_SHIM = "shims do not start"
    COORDINATOR = "kill the coordinator"
    SECOND_COORDINATOR = "another coordinator comes"
    CANCEL = "a stranger cancels"
    FINALIZE = "a stranger finalizes"
    STORM = "a stranger finalizes again and again"


WEIGHTS = {
    Kind.COORDINATOR: 3,
    Kind.SECOND_COORDINATOR: 2,
    Kind.FINALIZE: 3,
    Kind.SOURCE_SHIM: 2,
    Kind.DESTINATION_SHIM: 3,
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong. It comes at `at_step` of the loop if that is not zero, else at `at_s`."""

    kind: Kind
    at_step: int
    at_s: float
    after_s: float
    """How much later what was killed is started again; negative: it is left to whoever needs it. Or how long it lasts."""
    number: int
    """Drives what else there is to choose."""

    def __str__(self) -> str:
        return (
            f"{self.kind.value} at {f'step {self.at_step}' if self.at_step else f'{self.at_s * 1e3:.1f} ms'}"
        )


def choose(random: Random) -> list[Fault]:
    """0 to FAULTS_MAX faults."""
    kinds = list(Kind)
    weights = [WEIGHTS.get(kind, 1) for kind in kinds]
    return [_fault(random, kind) for kind in random.choices(kinds, weights, k=random.randint(0, FAULTS_MAX))]


def _fault(random: Random, kind: Kind) -> Fault:
    at_step = random.randrange(1, STEPS_OF_A_MOVE) if random.random() < 0.5 else 0
    at_s = random.uniform(0, SECONDS_OF_A_MOVE)
    stalls = kind in (Kind.STALL, Kind.VM_STALL)
    after_s = random.choice(STALLS_S) if stalls else random.choice((-1.0, *RESTARTS_S))
    return Fault(kind, at_step, at_s, after_s, random.getrandbits(16))
