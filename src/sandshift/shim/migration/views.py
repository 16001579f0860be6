"""What is to be seen of a shim's sessions: the active one's status, last statements and reports of ended ones."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from sandshift.session import statement
from sandshift.session.ids import SessionId, session_id
from sandshift.session.statement import Cell
from sandshift.session.states import Action, Side, State
from sandshift.shim.migration import books
from sandshift.shim.migration.destination import Destination
from sandshift.wire.sandshift import shim_pb2, state_pb2

if TYPE_CHECKING:
    from sandshift.shim.migration.desk import Desk
    from sandshift.shim.migration.session import Session


_ENDED_BY: Final = {
    Cell.KEPT: Action.RESUME,
    Cell.GONE: Action.STOP,
    Cell.RUNNING: Action.RESUME,
    Cell.REFUSED: Action.STOP,
}
"""What a session was finalized with: its last cell says so, where only its last statement is left."""


async def session_status(desk: Desk, wanted: str) -> shim_pb2.SessionStatus | None:
    """Of the active session, or of the one named, if this host still has its last statement. None: nothing is known."""
    active = desk.active
    if active is not None and wanted in ("", active.session.session_id):
        await active.session.look_at_vm()
        status = _of_active(active.session)
        if isinstance(active, Destination) and active.session.state is State.DESTINATION_IMPORTED:
            status.pending_containers.extend(active.patching.pending)
        return status
    if wanted in ("", desk.last.standing.session_id) and desk.active is None:
        return _of_last(desk)
    places = desk.sandbox.places
    kept = await asyncio.to_thread(books.kept_statements, places, session_id(wanted))
    return _of_statement(SessionId(wanted), kept[0]) if kept else None


def _of_active(session: Session) -> shim_pb2.SessionStatus:
    record = session.party.record
    failure = session.transfer.done.result() if session.transfer.done.done() else None
    return shim_pb2.SessionStatus(
        session_id=session.session_id,
        side=state_pb2.Side.ValueType(session.side.value),
        state=record.state.value,
        cell=state_pb2.Cell.ValueType(record.cell.value),
        receipt=session.receipt(),
        action=record.action.word if record.action else "",
        failure=failure.message if failure else record.reason,
        active=True,
        forced=record.forced,
    )


def _of_last(desk: Desk) -> shim_pb2.SessionStatus | None:
    standing = desk.standing
    if not standing.session_id:
        return None
    return shim_pb2.SessionStatus(
        session_id=standing.session_id,
        side=state_pb2.Side.ValueType((standing.side or Side.SOURCE).value),
        state=State.IDLE.value,
        cell=state_pb2.Cell.ValueType(desk.last.cell.value) if desk.last.cell else state_pb2.CELL_UNSPECIFIED,
        receipt=desk.last.receipt,
        action=standing.action.word if standing.action else "",
    )


def _of_statement(named: SessionId, kept: bytes) -> shim_pb2.SessionStatus:
    said = statement.unverified(kept)
    return shim_pb2.SessionStatus(
        session_id=named,
        side=state_pb2.Side.ValueType(said.side.value),
        state=State.IDLE.value,
        cell=state_pb2.Cell.ValueType(said.cell.value),
        receipt=kept,
        action=_ENDED_BY[said.cell].word if said.cell in _ENDED_BY else "",
        failure=said.reason,
    )


async def session_report(desk: Desk, wanted: str) -> bytes | None:
    """The newest report of an ended session of this id on this host."""
    kept = await asyncio.to_thread(books.kept_reports, desk.sandbox.places, session_id(wanted))
    return kept[0] if kept else None
