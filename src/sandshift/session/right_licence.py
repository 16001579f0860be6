"""The licence to start virtual CPUs.

`Machine.run_vcpus` is the one place through which virtual CPUs ever start, and it demands one of these. None can be
made outside this module, and this module makes one only for a record that holds the right to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sandshift.errors import IllegalMove
from sandshift.session.statement import Cell

if TYPE_CHECKING:
    from sandshift.session.right_model import Record

MAY_RUN: Final = frozenset((Cell.OPEN, Cell.KEPT, Cell.STARTING, Cell.RUNNING))
"""Cells in which a side's virtual CPUs may run. right-to-run.md, section 2."""

_made_here: Final = object()


class Licence:
    """Proof that whoever starts the virtual CPUs holds the right to run. Compares equal by what it was given for."""

    __slots__ = ("reason",)
    reason: str

    def __init__(self, reason: str, seal: object) -> None:
        if seal is not _made_here:
            raise TypeError("a Licence is made by session/right_licence.py alone")
        self.reason = reason

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Licence) and other.reason == self.reason

    def __hash__(self) -> int:
        return hash(self.reason)

    def __repr__(self) -> str:
        return f"Licence({self.reason!r})"


def demand(licence: object) -> None:
    """What `Machine.run_vcpus` does before anything else.

    Raises:
        TypeError: this is no Licence. Our own defect, never a caller's.
    """
    if not isinstance(licence, Licence):
        raise TypeError(f"virtual CPUs start with a Licence from session/, not with {type(licence).__name__}")


def licence_of(record: Record | None) -> Licence:
    """For starting the virtual CPUs outside a handover: a first boot, or after Task.Pause.

    Args:
        record: what the sandbox's last session wrote last; None if it never had one, so that it is nobody else's.

    Raises:
        IllegalMove: the record does not hold the right to run.
    """
    if record is None:
        return Licence("the sandbox never had a session", _made_here)
    return grant(record)


def grant(record: Record) -> Licence:
    """For a record that is on disk.

    Raises:
        IllegalMove: its cell may not run.
    """
    if record.cell not in MAY_RUN:
        raise IllegalMove(
            f"session {record.session_id!r}: the {record.side.word} is {record.cell.name} and may not run the guest"
        )
    return Licence(f"{record.session_id}: {record.side.word} {record.cell.name}", _made_here)
