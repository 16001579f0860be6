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
STEPS_OF_A_CALL = 120
"""Or so many turns after one of these calls has been made: where the right to run passes on, and around it."""
CALLS = (
    "TransferSandbox on the source",
    "TransferSandbox on the destination",
    "FinalizeSandbox(RESUME) on the destination",
    "FinalizeSandbox(RESUME) on the destination",
    "FinalizeSandbox(RESUME) on the destination",
    "FinalizeSandbox(STOP) on the source",
    "FinalizeSandbox(STOP) on the source",
    "FinalizeSandbox(RESUME) on the source",
    "FinalizeSandbox(STOP) on the destination",
    "Cancel on the source",
    "Cancel on the destination",
    "Cleanup on the source",
    "Cleanup on the destination",
)
THE_STOP = "the guest stops"
"""No call, and waited for as one: streams are frozen and handed over in what follows."""
POD_CALLS = (*CALLS, THE_STOP, THE_STOP, THE_STOP, THE_STOP)
STEPS_OF_THE_STOP = (15, 60, 360)
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
    REBOOT = "the guest reboots"
    POWER_OFF = "the guest powers itself off"
    PANIC = "the guest panics"


GUEST_EVENTS = frozenset((Kind.REBOOT, Kind.POWER_OFF, Kind.PANIC))
"""What only the guests of pods do: the seeds of bare sandboxes stand for the histories that they always stood for."""

WEIGHTS = {
    Kind.COORDINATOR: 3,
    Kind.SECOND_COORDINATOR: 2,
    Kind.FINALIZE: 3,
    Kind.SOURCE_SHIM: 2,
    Kind.DESTINATION_SHIM: 3,
}

POD_WEIGHTS = WEIGHTS | {
    Kind.SOURCE_SHIM: 6,
    Kind.DESTINATION_SHIM: 6,
    Kind.BOTH_SHIMS: 4,
    Kind.CUT: 2,
    Kind.CANCEL: 3,
    Kind.REFUSE_START: 4,
    Kind.DESTINATION_VM: 3,
}
"""What a pod must come through: it is often wound back, also after its streams were frozen."""
POD_STEPS = 1.5
"""A pod's streams and callers take about so many times as many turns of the loop."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    It comes at `at_step` of the loop, counted from the first `at_call` if there is one; with no step, at `at_s`.
    """

    kind: Kind
    at_call: str
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


def choose(random: Random, *, pod: bool) -> list[Fault]:
    """0 to FAULTS_MAX faults."""
    kinds = [kind for kind in Kind if pod or kind not in GUEST_EVENTS]
    weights = [(POD_WEIGHTS if pod else WEIGHTS).get(kind, 1) for kind in kinds]
    return [
        _fault(random, kind, pod=pod)
        for kind in random.choices(kinds, weights, k=random.randint(0, FAULTS_MAX))
    ]


def _fault(random: Random, kind: Kind, *, pod: bool) -> Fault:
    steps = POD_STEPS if pod else 1
    at_call, at_step = "", 0
    match random.choices(("call", "step", "moment"), (3, 2, 2))[0]:
        case "call":
            at_call = random.choice(POD_CALLS if pod else CALLS)
            most = random.choice(STEPS_OF_THE_STOP) if at_call == THE_STOP else int(STEPS_OF_A_CALL * steps)
            at_step = random.randrange(1, most)
        case "step":
            at_step = random.randrange(1, int(STEPS_OF_A_MOVE * steps))
    at_s = random.uniform(0, SECONDS_OF_A_MOVE)
    stalls = kind in (Kind.STALL, Kind.VM_STALL)
    after_s = random.choice(STALLS_S) if stalls else random.choice((-1.0, *RESTARTS_S))
    return Fault(kind, at_call, at_step, at_s, after_s, random.getrandbits(16))
