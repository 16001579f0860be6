"""Errors to statuses on the wire and back: the one place that knows which class has which code.

A shim answers `to_status(error)`; a client gets its class back with `from_status(status)`. Both ways are total: an
exception that is not ours becomes UNKNOWN with a text that gives nothing away, and every code, also one that we never
send, becomes a class that tells the caller what to do.

Three classes share their parent's code: `Blocked` comes back as `IllegalMove`, `VmRefused` as `PeerProtocolError` and
`GuestLost` as `Damaged`, each with its whole message.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from sandshift.errors import (
    Aborted,
    AlreadyThere,
    Cancelled,
    Damaged,
    Defect,
    IllegalMove,
    NoRoom,
    NotFound,
    NotSupported,
    PeerProtocolError,
    Rejected,
    SandshiftError,
    TimedOut,
    Unavailable,
)
from ttrpc import Code, StatusError

CODES: Final[Mapping[type[SandshiftError], Code]] = MappingProxyType(
    {
        Rejected: Code.INVALID_ARGUMENT,
        NotFound: Code.NOT_FOUND,
        AlreadyThere: Code.ALREADY_EXISTS,
        IllegalMove: Code.FAILED_PRECONDITION,
        Cancelled: Code.CANCELLED,
        Aborted: Code.ABORTED,
        NotSupported: Code.UNIMPLEMENTED,
        NoRoom: Code.RESOURCE_EXHAUSTED,
        Unavailable: Code.UNAVAILABLE,
        TimedOut: Code.DEADLINE_EXCEEDED,
        PeerProtocolError: Code.INTERNAL,
        Damaged: Code.DATA_LOSS,
        Defect: Code.UNKNOWN,
    }
)
"""What we send. A subclass that is not named here has its parent's code."""

CLASSES: Final[Mapping[Code, type[SandshiftError]]] = MappingProxyType(
    {code: error for error, code in CODES.items()}
    | {
        Code.OUT_OF_RANGE: Rejected,
        Code.PERMISSION_DENIED: Rejected,
        Code.UNAUTHENTICATED: Rejected,
    }
)
"""What we understand: all that we send, and what other ttrpc servers may answer."""

UNEXPLAINED: Final = "an internal error"


def status_of(error: BaseException) -> tuple[Code, str]:
    """The code and the message that a client is told about `error`.

    A `StatusError` is passed on as it is. An exception that is neither is our bug: the caller logs its traceback, and
    the client is told `UNEXPLAINED` and nothing of the exception's own text, which may hold a secret.
    """
    if isinstance(error, StatusError):
        return error.code, error.message
    if not isinstance(error, SandshiftError):
        return Code.UNKNOWN, UNEXPLAINED
    for ancestor in type(error).__mro__:
        if ancestor in CODES:
            return CODES[ancestor], error.message
    return Code.UNKNOWN, error.message


def error_of(code: Code, message: str) -> SandshiftError:
    """The error to raise for a status that a server answered. OK is not an error: it becomes `Defect`."""
    return CLASSES.get(code, Defect)(message)


def to_status(error: BaseException) -> StatusError:
    """`status_of`, ready to raise in a handler (`raise to_status(error) from error`)."""
    code, message = status_of(error)
    return StatusError(code, message)


def from_status(status: StatusError) -> SandshiftError:
    """`error_of`, from what a client caught (`raise from_status(status) from status`)."""
    return error_of(status.code, status.message)
