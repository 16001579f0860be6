"""How the last session of a shim ended: kept beside the sandbox, so that what ended it may be said again (contract 3)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from sandshift.errors import Unavailable
from sandshift.session.states import Action, Side, Standing, State
from sandshift.shim.durable import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from sandshift.session.statement import Cell
    from sandshift.shim.durable import Disk
    from sandshift.shim.migration.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LastSession:
    standing: Standing = field(default_factory=lambda: Standing(State.IDLE))
    cell: Cell | None = None
    receipt: bytes = b""
    """The last statement, signed."""


class _Document(msgspec.Struct, frozen=True):
    session_id: str
    side: int
    action: int
    cancelled: bool
    cell: int
    receipt: bytes


def keep(path: Path, last: LastSession) -> None:
    """Write it down. Blocks. Raises Unavailable."""
    standing = last.standing
    document = _Document(
        session_id=standing.session_id,
        side=standing.side.value if standing.side else 0,
        action=standing.action.value if standing.action else 0,
        cancelled=standing.cancelled,
        cell=last.cell.value if last.cell else 0,
        receipt=last.receipt,
    )
    write_atomically(path, msgspec.json.encode(document))


async def keep_end(disk: Disk, path: Path, session: Session) -> LastSession:
    """How `session`, which is over, ended: written down, so that a later shim knows it too.

    A disk that does not take it costs that and no more: the session is over, and its last statement is kept already.
    """
    ended = LastSession(session.standing, session.party.cell, session.receipt())
    try:
        await disk.run(lambda: keep(path, ended))
    except Unavailable as error:
        log.warning("how session %s ended is known to this shim alone: %s", session.session_id, error.message)
    return ended


def read(path: Path) -> LastSession:
    """What `keep` wrote; nothing if there is nothing, or nothing that can be read. Blocks."""
    from sandshift.session.statement import Cell  # noqa: PLC0415 - a shim that begins has nothing to read

    try:
        document = msgspec.json.decode(path.read_bytes(), type=_Document)
        standing = Standing(
            State.IDLE,
            document.session_id,
            Side(document.side),
            Action(document.action) if document.action else None,
            document.cancelled,
        )
        return LastSession(standing, Cell(document.cell), document.receipt)
    except (OSError, ValueError, msgspec.MsgspecError):
        return LastSession()
