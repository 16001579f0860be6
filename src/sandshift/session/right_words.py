"""What the handover protocol says when it refuses: sentences that name both cells and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sandshift.errors import IllegalMove, Unavailable, VmRefused
from sandshift.session.right_model import Party, Refusal
from sandshift.session.statement import Cell
from sandshift.session.states import Call, Side

if TYPE_CHECKING:
    from collections.abc import Mapping

MEANS: Final[Mapping[Cell, str]] = {
    Cell.OPEN: "the source holds the right to run",
    Cell.RELEASED: "the source has released the right to run and does not know who has it",
    Cell.KEPT: "the source keeps the right to run for good",
    Cell.GONE: "the source has given the right to run up for good",
    Cell.NONE: "the destination's memory is not complete",
    Cell.READY: "the destination is ready and has not been given the right to run",
    Cell.HELD: "the destination holds the right to run and has not started the guest",
    Cell.STARTING: "the destination was starting the guest, which may have run there",
    Cell.RUNNING: "the destination runs the guest",
    Cell.RETURNING: "the destination is giving the right to run back",
    Cell.REFUSED: "the destination has refused the right to run for good",
    Cell.LOST: "the destination's VM died while the guest was being started there: whether it ran is unknowable",
}

_REMEDY: Final[Mapping[tuple[Side, Cell], str]] = {
    (Side.SOURCE, Cell.OPEN): "finalize the destination with RESUME first, or repeat with its receipt",
    (Side.SOURCE, Cell.RELEASED): "repeat with its receipt",
    (Side.DESTINATION, Cell.READY): "repeat, or with the source's receipt; the source can still be resumed",
    (Side.DESTINATION, Cell.HELD): "finalize this side with RESUME, or repeat with the source's receipt",
    (
        Side.DESTINATION,
        Cell.RETURNING,
    ): "resume the source with this side's receipt, then repeat with the source's",
}


def both_cells(party: Party) -> str:
    """ "source RELEASED, destination RUNNING": own cell as it is, the peer's as last seen."""
    own = f"{party.side.word} {party.cell.name}"
    peer = f"{party.side.peer.word} {party.peer.cell.name if party.peer else 'not heard from'}"
    return f"{own}, {peer}" if party.side is Side.SOURCE else f"{peer}, {own}"


def cannot(party: Party, call: Call, why: str, remedy: str = "") -> Refusal:
    """FAILED_PRECONDITION."""
    because = f" ({party.record.reason})" if party.record.reason else ""
    advice = f": {remedy}" if remedy else ""
    return Refusal(IllegalMove, f"{_call(party, call)}: {why}{because} ({both_cells(party)}){advice}")


def no_answer(party: Party, call: Call) -> Refusal:
    """UNAVAILABLE: the peer does not answer, or not what this call waits for."""
    peer = party.side.peer.word
    if party.peer is not None and party.peer.cell in (Cell.STARTING, Cell.LOST):
        why = MEANS[party.peer.cell]
    else:
        why = f"the {peer} does not answer"
    own = MEANS[party.cell].removeprefix(f"the {party.side.word} ")
    remedy = _REMEDY.get((party.side, party.cell), "repeat")
    return Refusal(
        Unavailable, f"{_call(party, call)}: this side {own}, and {why} ({both_cells(party)}): {remedy}"
    )


def start_refused(party: Party, call: Call, reason: str) -> Refusal:
    """INTERNAL: the VM process did not start the guest, which still has not run."""
    said = f": {reason}" if reason else ""
    return Refusal(
        VmRefused,
        f"{_call(party, call)}: the {party.side.word}'s VM refused to start the guest, which has not run here{said} "
        f"({both_cells(party)}): repeat, or roll back",
    )


def _call(party: Party, call: Call) -> str:
    return f"session {party.record.session_id!r}, {call.value} on the {party.side.word}"
