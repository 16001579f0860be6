"""Every error that can reach a client, by what the client can do about it.

    SandshiftError
    ├── Rejected            change the request                            INVALID_ARGUMENT
    ├── NotFound            look again                                    NOT_FOUND
    ├── AlreadyThere        look again: same id, other content            ALREADY_EXISTS
    ├── IllegalMove         wait, or read the state                       FAILED_PRECONDITION
    │   └── Blocked         remove each of the named blockers             FAILED_PRECONDITION
    ├── Cancelled           nothing: it is what was asked                 CANCELLED
    ├── Aborted             decide, then try again                        ABORTED
    ├── NotSupported        use something else                            UNIMPLEMENTED
    ├── NoRoom              try another node, or later                    RESOURCE_EXHAUSTED
    ├── Unavailable         retry                                         UNAVAILABLE
    ├── TimedOut            ask for the outcome; it may have happened     DEADLINE_EXCEEDED
    ├── PeerProtocolError   drop the connection                           INTERNAL
    │   └── VmRefused       repeat, or roll back                          INTERNAL
    ├── Damaged             use the other copy                            DATA_LOSS
    │   └── GuestLost       page a human                                  DATA_LOSS
    └── Defect              report it: it is our bug                      UNKNOWN

Messages are sentences that name the object and the number and say what to do. They never repeat their cause
(``raise ... from`` shows it) and hold no secrets.
"""

from __future__ import annotations

from dataclasses import dataclass


class SandshiftError(Exception):
    """Not raised itself: raise one of the classes that tell the caller what to do."""

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class Rejected(SandshiftError):
    """The request is wrong: a bad argument, a bad configuration."""


class NotFound(SandshiftError):
    """The named thing is not here."""


class AlreadyThere(SandshiftError):
    """The same id is in use with other content."""


class IllegalMove(SandshiftError):
    """Not in this phase."""


@dataclass(frozen=True, slots=True, order=True)
class Blocker:
    """One thing that stands in the way of a move, and what removes it."""

    subject: str
    """What is looked at, dotted: "qemu.version", "machine.cpu"."""
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.problem}; {self.remedy}"


class Blocked(IllegalMove):
    """Something stands in the way; all of it is named at once."""

    def __init__(self, what: str, blockers: list[Blocker]) -> None:
        self.blockers = sorted(blockers)
        super().__init__(f"{what}: " + " | ".join(str(blocker) for blocker in self.blockers))


class Cancelled(SandshiftError):
    """Somebody asked for it."""


class Aborted(SandshiftError):
    """The guest or a threshold ended it."""


class NotSupported(SandshiftError):
    """This backend cannot do it."""


class NoRoom(SandshiftError):
    """A limit is reached: memory, slots, subscribers."""


class Unavailable(SandshiftError):
    """A part that is needed does not answer. Retry with the same ids."""


class TimedOut(SandshiftError):
    """The bound passed; it may have happened all the same."""


class PeerProtocolError(SandshiftError):
    """The other end does not speak as agreed."""


class VmRefused(PeerProtocolError):
    """The VM process refused what it had to do, and nothing has happened to the guest."""


class Damaged(SandshiftError):
    """A blob, a journal or the guest's memory is not what its digest says."""


class GuestLost(Damaged):
    """Gone on both sides."""


class Defect(SandshiftError):
    """Something failed that nobody foresaw: the log of the process that answered has the traceback."""
