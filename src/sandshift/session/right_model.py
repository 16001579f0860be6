"""What the handover protocol is made of: a side (`Party`), what happens to it (events), what it orders (steps).

All values are frozen, comparable and hashable: the explorer puts them into sets.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from sandshift.errors import SandshiftError
from sandshift.session.right_licence import Licence
from sandshift.session.statement import Ask, Cell, Statement
from sandshift.session.states import BEFORE_COMPLETION, Action, Call, Event, Side, Standing, State

_ACTION_OF: Final = {
    Cell.KEPT: Action.RESUME,
    Cell.GONE: Action.STOP,
    Cell.RUNNING: Action.RESUME,
    Cell.REFUSED: Action.STOP,
}


@dataclass(frozen=True, slots=True)
class Record:
    """What is on disk about a session's right to run. The newest one counts, whole."""

    side: Side
    session_id: str
    cell: Cell
    state: State
    complete: bool = False
    """Own VM process reported the transfer completed."""
    cancelled: bool = False
    """Somebody called Cancel, and it was done."""
    forced: bool = False
    """FORCED: an operator took the right where the protocol could not give it."""
    reason: str = ""
    """Why the cell is what it is, where that is more than a call."""
    handover: bytes = b""
    """Source: the serialized HandoverRecord, from "memory complete" on."""
    peer_handover: bytes = b""
    """Destination: the source's, from HELD on."""

    @property
    def action(self) -> Action | None:
        """What the session was finalized with; follows from the cell, which is final by then."""
        return _ACTION_OF.get(self.cell) if self.state in (State.FINALIZED, State.IDLE) else None

    @property
    def before_completion(self) -> bool:
        return self.state in BEFORE_COMPLETION

    @property
    def standing(self) -> Standing:
        return Standing(self.state, self.session_id, self.side, self.action, self.cancelled)


class Channel(enum.Enum):
    """What this process knows of its end of the channel."""

    DOWN = "down"
    UP = "up"
    HEARD = "heard"
    """A frame of the peer was read, so its VM process does not read any more: now the destination may write."""


@dataclass(frozen=True, slots=True)
class Pending:
    """The one call that is being served: it waits for the peer, or for its own VM to start."""

    call: Call
    ask: Ask = Ask.NOTHING
    """What it asks of the peer."""
    ask_number: int = 0
    """Of the question that it waits to see answered; 0: nothing could be sent yet."""
    starting: bool = False
    """A start of the virtual CPUs is on its way."""
    owes: int = 0
    """Number of a question of the peer's, to be answered once the start is over."""


@dataclass(frozen=True, slots=True)
class Party:
    """One side: what is on disk, and what only this process knows."""

    record: Record
    vm_alive: bool = True
    """As last seen; look again before every `handle` (session/right.py)."""
    channel: Channel = Channel.DOWN
    pending: Pending | None = None
    next_ask: int = 1
    """Number of the next question: start at a random 64-bit number in each process life."""
    peer: Statement | None = None
    """The last statement of the peer that was seen: for messages only, no decision looks at it."""

    @property
    def cell(self) -> Cell:
        return self.record.cell

    @property
    def state(self) -> State:
        return self.record.state

    @property
    def side(self) -> Side:
        return self.record.side

    @property
    def complete(self) -> bool:
        return self.record.complete


def new_party(side: Side, session_id: str, state: State, *, next_ask: int = 1) -> Party:
    """A side at the start of its session. The caller writes `party.record` before it acknowledges anything."""
    cell = Cell.OPEN if side is Side.SOURCE else Cell.NONE
    return Party(Record(side, session_id, cell, state), next_ask=next_ask)


def restored_party(record: Record, *, next_ask: int = 1) -> Party:
    """A side as a new process finds it on disk: feed it `Restarted` before anything else."""
    return Party(record, next_ask=next_ask)


def current_statement(party: Party) -> Statement:
    """What a status call gives: the receipt of now."""
    record = party.record
    handover = record.handover if record.side is Side.SOURCE and record.complete else b""
    return Statement(record.cell, reason=record.reason, handover=handover)


# Events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallMade:
    """RESUME, STOP, CANCEL or CLEANUP. `receipt` has been opened and belongs to this session and the peer."""

    call: Call
    receipt: Statement | None = None


@dataclass(frozen=True, slots=True)
class FrameRead:
    """A frame of the peer that verified."""

    statement: Statement


@dataclass(frozen=True, slots=True)
class ChannelUp:
    """This process has its end of the channel."""

    heard: bool = False
    """An earlier process of this side has read a frame of the peer: its VM process does not read any more."""


@dataclass(frozen=True, slots=True)
class ChannelLost:
    """End of file, an error, a frame that does not verify, or closed by ourselves."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The session moves before completion (exported ... transferring); written like every other transition."""

    event: Event


@dataclass(frozen=True, slots=True)
class MemoryComplete:
    """Own VM process reported the transfer *completed*. `handover`: source only."""

    handover: bytes = b""


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """Own VM process reported the transfer failed, a limit ended it, or the memory turned out to be of no use."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class VmDied:
    """The VM process is gone."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class StartSucceeded:
    """The virtual CPUs run."""


@dataclass(frozen=True, slots=True)
class StartRefused:
    """The VM process refused the start and reports that the virtual CPUs still have not run."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class AskTimedOut:
    """The peer did not answer within the limit for a handover frame."""


class Transfer(enum.Enum):
    """What the VM process says of its migration when a new shim process looks."""

    NONE = "none"
    GOING_ON = "going on"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Restarted:
    """A new process has read the record and looked at the VM."""

    vm_alive: bool
    vm_running: bool = False
    """It runs, or shows that it has run since it was loaded: shut down, panicked, stopped by an error of its own."""
    transfer: Transfer = Transfer.NONE
    handover: bytes = b""
    """Source whose transfer completed while no shim was there: the handover record, made now."""


@dataclass(frozen=True, slots=True)
class ForceResume:
    """An operator's decision (right-to-run.md, section 9). `expected` is the cell that they saw."""

    expected: Cell


RightEvent = (
    CallMade | FrameRead | ChannelUp | ChannelLost | Moved | MemoryComplete | TransferFailed | VmDied
    | StartSucceeded | StartRefused | AskTimedOut | Restarted | ForceResume
)  # fmt: skip


# Steps ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """Durable (fsync of file and directory) before the next step."""

    record: Record


@dataclass(frozen=True, slots=True)
class SendFrame:
    """Sign it and write it to the channel. An error is a lost channel, never a failed step."""

    statement: Statement


@dataclass(frozen=True, slots=True)
class StopTransfer:
    """End whatever transfer is still going on in the own VM process, and with it the channel. Nothing to do otherwise."""


@dataclass(frozen=True, slots=True)
class StartVcpus:
    """`run_vcpus(licence)`; its outcome is the next event."""

    licence: Licence


@dataclass(frozen=True, slots=True)
class DestroyVm:
    """End the VM process and what it holds."""


@dataclass(frozen=True, slots=True)
class KeepLastStatement:
    """Sign it and keep it on this host, keyed by session id and key id, durable: it outlives the shim."""

    statement: Statement


@dataclass(frozen=True, slots=True)
class Refusal:
    kind: type[SandshiftError]
    message: str

    def error(self) -> SandshiftError:
        return self.kind(self.message)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the call that is being served; `refusal` None is success."""

    call: Call
    refusal: Refusal | None = None


Step = WriteRecord | SendFrame | StopTransfer | StartVcpus | DestroyVm | KeepLastStatement | Reply
