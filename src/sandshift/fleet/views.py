"""What both sides say about a session, and what a coordinator who knows nothing else makes of it. Pure.

`as_recovery_view` is how `session/recovery.py` sees a side; `joinable` is how far a former coordinator had come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from sandshift.fleet import saga as steps
from sandshift.fleet.saga import BEFORE_TRANSFER, Step
from sandshift.session import recovery
from sandshift.session.statement import Cell
from sandshift.session.states import Action, Side, State
from sandshift.wire.sandshift import shim_pb2

EMPTY_STATES: Final = frozenset({"absent", "stopped", "dead"})
"""What Status calls a shim's VM when there is none."""
ENDED_STATES: Final = frozenset({"stopped", "dead"})
HAS_SOCKET: Final = frozenset({State.SOCKET_READY, State.TRANSFERRING, State.TRANSFER_COMPLETED})
_STATES: Final = {state.value: state for state in State}
_CELLS: Final = {cell.value: cell for cell in Cell}
_ACTIONS: Final = {action.word: action for action in Action}
_ENDED_BY: Final = {
    Cell.KEPT: Action.RESUME,
    Cell.GONE: Action.STOP,
    Cell.RUNNING: Action.RESUME,
    Cell.REFUSED: Action.STOP,
}


@dataclass(frozen=True, slots=True)
class SideView:
    """What one side says about the session."""

    answers: bool = True
    """Its shim could be asked."""
    known: bool = False
    """It has the session open, or keeps its last statement."""
    state: State = State.IDLE
    cell: Cell | None = None
    receipt: bytes = field(default=b"", repr=False)
    """Its current statement, signed: what its peer is given."""
    action: Action | None = None
    vm_alive: bool = False
    ended_here: bool = False
    """The sandbox is still known there and its VM has ended there: it has neither left nor been removed."""

    @property
    def active(self) -> bool:
        return self.known and self.state is not State.IDLE

    @property
    def words(self) -> str:
        """For messages: "KEPT (Finalized)", "does not answer"."""
        if not self.answers:
            return "does not answer"
        if not self.known:
            return "does not know the session"
        return f"{self.cell.name if self.cell else 'without a cell'} ({self.state.value})"


SILENT: Final = SideView(answers=False)


@dataclass(frozen=True, slots=True)
class Views:
    """Both sides, as read last."""

    source: SideView
    destination: SideView

    def of(self, side: Side) -> SideView:
        return self.source if side is Side.SOURCE else self.destination

    @property
    def known(self) -> bool:
        """Somebody knows the session."""
        return self.source.known or self.destination.known

    @property
    def runner(self) -> Side | None:
        """The side that certainly runs the guest: its cell is final and its VM lives."""
        if self.destination.cell is Cell.RUNNING and self.destination.vm_alive:
            return Side.DESTINATION
        if self.source.cell is Cell.KEPT and self.source.vm_alive:
            return Side.SOURCE
        return None


def side_view(status: shim_pb2.StatusResponse, session_id: str, side: Side) -> SideView:
    """A status as the rules need it. A state or cell that this program does not know counts as not said.

    What the host was on the other side of (an id may be used again, the other way) is another session.
    """
    session, alive = status.session, status.vm_state not in EMPTY_STATES
    if session.session_id != session_id or session.side != side.value:
        return SideView(vm_alive=alive)
    cell = _CELLS.get(session.cell)
    state = _STATES.get(session.state, State.IDLE) if session.active else State.IDLE
    return SideView(
        known=True,
        state=state,
        cell=cell,
        receipt=session.receipt,
        action=_ACTIONS.get(session.action) or _action_of(cell, state),
        vm_alive=alive,
        ended_here=status.vm_state in ENDED_STATES and not status.moved_to,
    )


def _action_of(cell: Cell | None, state: State) -> Action | None:
    """What an ended session was finalized with: its last cell says so, where only its last statement is left."""
    return _ENDED_BY.get(cell) if cell and state is State.IDLE else None


def as_recovery_view(side: Side, views: Views) -> recovery.View | None:
    """How the recovery procedure sees a side; None: nothing can be learned from it.

    A side that answers and never had the session counts as one that ended it, where that is sure: a destination that
    nothing was imported to discards nothing, as long as the source still has the right; a source that exported nothing
    runs its guest, as long as it is seen to, or the destination has nothing that could be lost.
    """
    own, peer = views.of(side), views.of(side.peer)
    if own.known and own.cell is not None:
        return recovery.View(own.cell, own.state, own.receipt, own.vm_alive, own.action)
    if own.known or not own.answers:
        return None
    if side is Side.DESTINATION and peer.cell in (Cell.OPEN, Cell.KEPT, None):
        return recovery.View(Cell.REFUSED, State.IDLE, b"", vm_alive=False, action=Action.STOP)
    if side is Side.SOURCE and (own.vm_alive or peer.cell in (Cell.NONE, Cell.REFUSED)):
        return recovery.View(Cell.KEPT, State.IDLE, b"", own.vm_alive, Action.RESUME)
    return None


def joinable(views: Views, *, destination_open: bool) -> tuple[Step, ...] | None:
    """What a former coordinator has achieved, if the move can go on from there; None: it must be finished or undone.

    Going on takes nothing from a coordinator who is still alive: each of its calls is joined, or answered the same
    again.

    Args:
        views: both sides.
        destination_open: the destination had a shim of this sandbox before anybody asked.
    """
    source, destination = views.source, views.destination
    if not (source.active and source.cell in (Cell.OPEN, None)):
        return None
    if source.state in HAS_SOCKET and destination.active and destination.state in HAS_SOCKET:
        return BEFORE_TRANSFER if destination.cell in (Cell.NONE, Cell.READY, None) else None
    if source.state is not State.SOURCE_EXPORTED or not destination.answers:
        return None
    if not destination.known:
        return (steps.OPEN,) if destination_open else ()
    match destination.state:
        case State.DESTINATION_IMPORTED:
            return (steps.OPEN, steps.EXPORT, steps.IMPORT)
        case State.DESTINATION_PREPARED:
            return (steps.OPEN, steps.EXPORT, steps.IMPORT, steps.PREPARE)
        case _:
            return None
