"""How a transfer ended, and what each side says about it: the table of contract 4.9 and the codes of 4.7.

Every ending that a shim can see is one `Outcome` and one row of `ENDINGS`. An outcome is what *this* side knows: a
destination whose source was cancelled by somebody else sees only that the source went.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sandshift.errors import Aborted, Cancelled, Damaged, Defect, SandshiftError, TimedOut, Unavailable
from sandshift.session.states import Side
from sandshift.wire.migration import options_pb2


class Phase(enum.Enum):
    """The contract's phases. The value is the number on the wire."""

    SETUP_DONE = 1
    TRANSFER_IN_PROGRESS = 2
    BLACKOUT_STARTED = 3
    OFFLINE_DONE = 4
    BLACKOUT_EXITED = 5
    DONE = 6
    RECOVERY_DONE = 7
    FAILED = 8

    @property
    def proto(self) -> options_pb2.Phase.ValueType:
        return options_pb2.Phase.Value(f"PHASE_{self.name}")


class PhaseState(enum.Enum):
    """The contract's phase states. The value is the number on the wire."""

    SUCCESS = 1
    CANCELLED = 2
    GUEST_INITIATED_CANCELLATION = 3
    SOURCE_FAILED = 4
    DESTINATION_FAILED = 5
    RECOVERY_FAILED = 6

    @property
    def proto(self) -> options_pb2.PhaseState.ValueType:
        return options_pb2.PhaseState.Value(f"PHASE_STATE_{self.name}")


class Outcome(enum.Enum):
    """How a transfer ended, as far as this side knows."""

    SUCCESS = "success"
    CANCELLED = "cancelled"
    """Somebody called Cancel, or a Finalize that undoes."""
    GUEST_RESET = "guest-reset"
    """The guest was reset or powered off while it moved."""
    BLACKOUT_THRESHOLD = "blackout-threshold"
    """The blackout would have been longer than the caller allows."""
    SOCKET_WAIT = "socket-wait"
    """No channel came in time."""
    DEADLINE = "deadline"
    STALL = "stall"
    """No byte moved."""
    PEER_LOST = "peer-lost"
    """The channel, or the VM at its other end, is gone."""
    OWN_VM_FAILED = "own-vm-failed"
    """This side's VM process refused, failed or died."""
    CHECKSUM = "checksum"
    """The guest's memory is not the same on both sides."""
    DEFECT = "defect"
    """An error of ours."""


@dataclass(frozen=True, slots=True)
class Told:
    """A phase and its state, as a notification says it."""

    phase: Phase
    state: PhaseState


@dataclass(frozen=True, slots=True)
class Ending:
    """One row: what the source says before and after the guest stopped there, what the destination says."""

    source_before: Told
    source_after: Told
    destination: Told
    code: int
    """gRPC code of TransferSandbox."""
    error: type[SandshiftError] | None


_D, _F = Phase.DONE, Phase.FAILED
_S: Final = PhaseState
OK, CANCELLED, DEADLINE_EXCEEDED, ABORTED, INTERNAL, UNAVAILABLE, DATA_LOSS = 0, 1, 4, 10, 13, 14, 15
"""gRPC's codes, as far as a transfer can end with them."""


def _fault(side: Side, code: int, error: type[SandshiftError]) -> Ending:
    """A row where `side` is at fault: the source says FAILED before the blackout and DONE after it."""
    if side is Side.SOURCE:
        told = Told(_D, _S.SOURCE_FAILED)
        return Ending(Told(_F, _S.SOURCE_FAILED), told, told, code, error)
    blamed = _S.DESTINATION_FAILED
    return Ending(Told(_F, blamed), Told(_D, blamed), Told(_F, blamed), code, error)


def _cancelled(code: int, error: type[SandshiftError]) -> Ending:
    source = Told(_F, _S.CANCELLED)
    return Ending(source, source, Told(_D, _S.CANCELLED), code, error)


_SUCCESS: Final = Told(_D, _S.SUCCESS)
_GUEST: Final = Told(_F, _S.GUEST_INITIATED_CANCELLATION)

ENDINGS: Final[Mapping[tuple[Outcome, Side], Ending]] = MappingProxyType(
    {
        **{(Outcome.SUCCESS, side): Ending(_SUCCESS, _SUCCESS, _SUCCESS, OK, None) for side in Side},
        **{(Outcome.CANCELLED, side): _cancelled(CANCELLED, Cancelled) for side in Side},
        **{
            (Outcome.GUEST_RESET, side): Ending(_GUEST, _GUEST, Told(_D, _S.SOURCE_FAILED), ABORTED, Aborted)
            for side in Side
        },
        # Rules that end a transfer on purpose: nobody is at fault.
        **{(Outcome.BLACKOUT_THRESHOLD, side): _cancelled(ABORTED, Aborted) for side in Side},
        **{(Outcome.DEADLINE, side): _cancelled(DEADLINE_EXCEEDED, TimedOut) for side in Side},
        **{(Outcome.STALL, side): _cancelled(DEADLINE_EXCEEDED, TimedOut) for side in Side},
        # Upstream blames the side on which the wait ended.
        **{(Outcome.SOCKET_WAIT, side): _fault(side, DEADLINE_EXCEEDED, TimedOut) for side in Side},
        **{(Outcome.PEER_LOST, side): _fault(side.peer, UNAVAILABLE, Unavailable) for side in Side},
        **{(Outcome.OWN_VM_FAILED, side): _fault(side, UNAVAILABLE, Unavailable) for side in Side},
        # The source's memory is the one that the guest made, so the copy is what is wrong.
        **{(Outcome.CHECKSUM, side): _fault(Side.DESTINATION, DATA_LOSS, Damaged) for side in Side},
        **{(Outcome.DEFECT, side): _fault(side, INTERNAL, Defect) for side in Side},
    }
)

PROGRESSION: Final = (
    Phase.SETUP_DONE,
    Phase.TRANSFER_IN_PROGRESS,
    Phase.BLACKOUT_STARTED,
    Phase.OFFLINE_DONE,
)
"""What a source tells on the way, in this order, each SUCCESS; a destination tells nothing on the way."""
TERMINAL: Final = frozenset({Phase.DONE, Phase.FAILED})
"""The phases that end a transfer, and revision 2691's stream."""


def ending(outcome: Outcome, side: Side, *, in_blackout: bool) -> Told:
    """What `side` says when its transfer ends with `outcome`. `in_blackout`: the guest has stopped on the source."""
    row = ENDINGS[outcome, side]
    if side is Side.DESTINATION:
        return row.destination
    return row.source_after if in_blackout else row.source_before


def code(outcome: Outcome, side: Side) -> int:
    """The gRPC code with which a waiting TransferSandbox ends."""
    return ENDINGS[outcome, side].code


def error(outcome: Outcome, side: Side, message: str) -> SandshiftError | None:
    """The error with which a waiting TransferSandbox ends; None for success."""
    kind = ENDINGS[outcome, side].error
    return kind(message) if kind else None


def recovery(*, succeeded: bool) -> Told:
    """What a source says when it has wound a failed migration back, or could not."""
    return Told(Phase.RECOVERY_DONE, PhaseState.SUCCESS if succeeded else PhaseState.RECOVERY_FAILED)
