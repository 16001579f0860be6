"""A session as one side tells it: for a person who looks, and for a coordinator who must decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sandshift.errors import Rejected, SandshiftError
from sandshift.fleet.host import Host, start_shim
from sandshift.fleet.shim_client import Shim, connect
from sandshift.session.statement import Cell
from sandshift.session.states import Side
from sandshift.wire.sandshift import shim_pb2

FORCE_S: Final = 60.0

DANGERS: Final = {
    Cell.RELEASED: "the destination may be running this guest: two guests would write to the same outside world",
    Cell.READY: "the source may be running this guest: two guests would write to the same outside world",
    Cell.NONE: "this side's memory is not complete: there is nothing to run",
    Cell.OPEN: "the source holds the right already: resume it with 'sandshift migrate --session'",
    Cell.LOST: "this side's VM is gone: there is nothing to run",
    Cell.GONE: "this side gave its VM up for good: there is nothing to run",
}
"""What forcing the right in a cell risks. Source: right-to-run.md section 9."""


@dataclass(frozen=True, slots=True)
class SideReport:
    """What one side says about a session."""

    host: str
    session_id: str
    side: str
    state: str
    cell: str
    active: bool
    vm_state: str
    action: str = ""
    failure: str = ""
    forced: bool = False
    problem: str = ""
    """Why the side said nothing."""

    def document(self) -> dict[str, object]:
        """As JSON shows it: docs/reference/cli.md, "sandshift session show"."""
        return {name: getattr(self, name) for name in self.__slots__}


def side_report(host: Host, status: shim_pb2.StatusResponse) -> SideReport:
    """What a status says about its session. Names that this program does not know become numbers."""
    session = status.session
    return SideReport(
        host=host.name,
        session_id=session.session_id,
        side=_word(session.side),
        state=session.state or "Idle",
        cell=cell_name(session.cell),
        active=session.active,
        vm_state=status.vm_state,
        action=session.action,
        failure=session.failure,
        forced=session.forced,
    )


def _word(side: int) -> str:
    try:
        return Side(side).word
    except ValueError:
        return ""


def cell_name(cell: int) -> str:
    """ "OPEN"; empty for none."""
    try:
        return Cell(cell).name
    except ValueError:
        return str(cell) if cell else ""


async def show(host: Host, namespace: str, sandbox_id: str, session_id: str = "") -> SideReport:
    """What `host` says about a session of the sandbox (empty: the active one, or the last). Never raises for a side
    that does not answer: it is told in `problem`."""
    try:
        shim = await connect(host, namespace, sandbox_id)
        try:
            return side_report(host, await shim.status(session_id))
        finally:
            await shim.close()
    except SandshiftError as error:
        return SideReport(host.name, session_id, "", "", "", active=False, vm_state="", problem=error.message)


async def revive(host: Host, namespace: str, sandbox_id: str) -> SideReport:
    """Start a shim that died again on its state directory: it finds its VM and its session. One that lives stays.

    Raises what `start_shim` and `connect` do.
    """
    await start_shim(host, namespace, sandbox_id)
    shim = await connect(host, namespace, sandbox_id)
    try:
        return side_report(host, await shim.status())
    finally:
        await shim.close()


async def force_resume(shim: Shim, session_id: str, expected: Cell) -> None:
    """Give this side the right to run, against the protocol. It is written down first, and refused if the cell is no
    longer the one that the operator saw.

    Raises:
        IllegalMove: the cell has changed, or there is nothing to run. Rejected: no such session.
    """
    request = shim_pb2.ForceResumeRequest(
        session_id=session_id,
        expected_cell=shim_pb2.ForceResumeRequest(expected_cell=expected.value).expected_cell,  # type: ignore[arg-type]
        confirm=session_id,
    )
    await shim.said(shim.shim.force_resume(request, timeout_s=FORCE_S))


async def forceable(shim: Shim, session_id: str) -> Cell:
    """The cell of a session that an operator might force.

    Raises:
        Rejected: the shim does not know the session, or nothing can be forced in its cell; says why.
    """
    session = (await shim.status(session_id)).session
    where = f"session {session_id!r} of sandbox {shim.sandbox_id} on host {shim.host.name}"
    if session.session_id != session_id or not session.active:
        raise Rejected(f"{where} is not active: there is nothing to force")
    cell = Cell(session.cell) if session.cell else None
    if cell not in (Cell.RELEASED, Cell.READY, Cell.NONE):
        reason = (
            DANGERS.get(cell, "this side runs the guest or decides for itself") if cell else "it has no cell"
        )
        raise Rejected(f"{where} is {cell.name if cell else 'empty'}: {reason}")
    return cell
