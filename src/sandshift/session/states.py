"""The states of a migration session, which call is legal in which of them, and every move from one to another.

All of it is data and all of it is here: `LEGALITY` (one row a state, one column a kind of call), `MOVES` (a missing
key is an illegal move), and what a refusal says, which is made from the same rows. The diagram and the table in
docs/reference/migration-states.md are printed from them, and a test holds the table against the contract's.

What a call does once it is legal is not decided here; where the table says `BY_RIGHT`, session/right.py decides.
"""

from __future__ import annotations

import enum
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sandshift.errors import AlreadyThere, IllegalMove, Rejected

SESSION_ID_BYTES_MAX: Final = 256


class Side(enum.Enum):
    """Which end of a migration a shim is. Values are those of sandshift.state.v1.Side."""

    SOURCE = 1
    DESTINATION = 2

    @property
    def peer(self) -> Side:
        return Side.DESTINATION if self is Side.SOURCE else Side.SOURCE

    @property
    def word(self) -> str:
        return self.name.lower()


class State(enum.Enum):
    """Where a session is; values are the contract's names."""

    IDLE = "Idle"
    SOURCE_EXPORTED = "SourceExported"
    DESTINATION_IMPORTED = "DestinationImported"
    DESTINATION_PREPARED = "DestinationPrepared"
    SOCKET_WAITING = "SocketWaiting"
    SOCKET_READY = "SocketReady"
    TRANSFERRING = "Transferring"
    TRANSFER_COMPLETED = "TransferCompleted"
    CANCELLING = "Cancelling"
    CANCELLED = "Cancelled"
    FAILED = "Failed"
    FINALIZED = "Finalized"


class Action(enum.Enum):
    """What a session was finalized with. Values are those of FinalizeAction."""

    STOP = 1
    RESUME = 2

    @property
    def word(self) -> str:
        return self.name.lower()


class Call(enum.Enum):
    """What a caller can ask for; values are the method as a refusal names it."""

    PREPARE_AND_EXPORT = "PrepareAndExportSandbox"
    IMPORT = "ImportSandbox"
    CREATE_TASK = "Task.Create"
    """With the annotation that names the source container: the patch of an imported one."""
    PREPARE = "PrepareSandbox"
    CREATE_DUPLICATE_SOCKET = "CreateDuplicateSocket"
    TRANSFER = "TransferSandbox"
    RESUME = "FinalizeSandbox(RESUME)"
    STOP = "FinalizeSandbox(STOP)"
    CANCEL = "Cancel"
    CLEANUP = "Cleanup"
    NOTIFICATIONS = "Notifications"

    @property
    def action(self) -> Action | None:
        return {Call.RESUME: Action.RESUME, Call.STOP: Action.STOP}.get(self)


class Column(enum.Enum):
    """The table's columns: a Finalize counts by what it means, which depends on the side."""

    PREPARE_AND_EXPORT = "PrepareAndExport"
    IMPORT = "Import"
    CREATE_TASK = "Task.Create (annotated)"
    PREPARE = "PrepareSandbox"
    CREATE_DUPLICATE_SOCKET = "CreateDuplicateSocket"
    TRANSFER = "Transfer"
    FINALIZE_BACK = "Finalize SRC RESUME, DST STOP"
    FINALIZE_SOURCE_STOP = "Finalize SRC STOP"
    FINALIZE_DESTINATION_RESUME = "Finalize DST RESUME"
    CANCEL = "Cancel"
    CLEANUP = "Cleanup"
    NOTIFICATIONS = "Notifications"


class Outcome(enum.Enum):
    """What the table says; values are how docs and contract write it."""

    PROCEED = "+"
    WAITS = "+ waits"
    """Proceeds, and waits for the socket."""
    JOINS = "+ joins"
    """The same work is under way: wait for its outcome."""
    JOINS_THEN = "+ joins, then"
    """Wait for the cancellation under way, then proceed as in Cancelled."""
    BY_RIGHT = "+ by right to run"
    """The handover protocol decides between success, FAILED_PRECONDITION and UNAVAILABLE."""
    NO_EFFECT = "="
    SAME_EXPORT = "= same blob, same options; else FP"
    SAME_IMPORT = "= same id and config; else FP"
    SAME_ACTION = "= same action, else FP"
    ILLEGAL = "FP"
    EXISTS = "AE"
    NEVER = "-"
    """No shim of the side that this column means is ever in this state."""

    @property
    def refuses(self) -> bool:
        return self in (Outcome.ILLEGAL, Outcome.EXISTS, Outcome.NEVER)


def _legality() -> Mapping[State, Mapping[Column, Outcome]]:
    s = State
    go, eq, no, ae, na = Outcome.PROCEED, Outcome.NO_EFFECT, Outcome.ILLEGAL, Outcome.EXISTS, Outcome.NEVER
    wt, jn, jt, rt = Outcome.WAITS, Outcome.JOINS, Outcome.JOINS_THEN, Outcome.BY_RIGHT
    xp, im, sa = Outcome.SAME_EXPORT, Outcome.SAME_IMPORT, Outcome.SAME_ACTION
    rows = {
        #                    PaE Imp Tsk Pre Sck Tra Bck SST DRE Can Cln Not
        s.IDLE:                 (go, go, no, no, no, no, no, no, no, no, eq, no),
        s.SOURCE_EXPORTED:      (xp, no, no, no, go, wt, go, no, na, go, no, go),
        s.DESTINATION_IMPORTED: (no, im, go, go, no, no, go, na, no, go, no, go),
        s.DESTINATION_PREPARED: (no, no, no, eq, go, wt, go, na, no, go, no, go),
        s.SOCKET_WAITING:       (no, no, no, no, go, jn, go, no, no, go, no, go),
        s.SOCKET_READY:         (no, no, no, no, ae, go, go, no, no, go, no, go),
        s.TRANSFERRING:         (no, no, no, no, ae, jn, go, no, no, go, no, go),
        s.TRANSFER_COMPLETED:   (no, no, no, no, ae, eq, rt, rt, rt, go, no, go),
        s.CANCELLING:           (no, no, no, no, no, no, jt, no, no, jn, no, go),
        s.CANCELLED:            (no, no, no, no, no, no, rt, rt, rt, eq, go, go),
        s.FAILED:               (no, no, no, no, no, no, rt, rt, rt, eq, go, go),
        s.FINALIZED:            (no, no, no, no, no, no, sa, sa, sa, no, go, go),
    }  # fmt: skip
    return MappingProxyType(
        {state: MappingProxyType(dict(zip(Column, row, strict=True))) for state, row in rows.items()}
    )


LEGALITY: Final = _legality()


class Event(enum.Enum):
    """What moves a session from one state to another."""

    EXPORTED = "exported"
    IMPORTED = "imported"
    PREPARED = "prepared"
    TRANSFER_CALLED = "transfer called"
    """Without a socket yet."""
    SOCKET_GIVEN = "socket given"
    TRANSFER_STARTED = "transfer started"
    MEMORY_COMPLETE = "memory complete"
    BROKEN = "broken"
    """The transfer failed, a limit passed, the guest ended it, or the VM died before the memory was complete."""
    CANCEL_CALLED = "cancel called"
    CANCEL_DONE = "cancel done"
    FINALIZED = "finalized"
    CLEANED = "cleaned"


BEFORE_COMPLETION: Final = (
    State.SOURCE_EXPORTED,
    State.DESTINATION_IMPORTED,
    State.DESTINATION_PREPARED,
    State.SOCKET_WAITING,
    State.SOCKET_READY,
    State.TRANSFERRING,
)
"""A session is under way and its memory is not complete: a call to go back first does what Cancel does."""


def _moves() -> Mapping[tuple[State, Event], State]:
    s, e = State, Event
    moves = {
        (s.IDLE, e.EXPORTED): s.SOURCE_EXPORTED,
        (s.IDLE, e.IMPORTED): s.DESTINATION_IMPORTED,
        (s.DESTINATION_IMPORTED, e.PREPARED): s.DESTINATION_PREPARED,
        (s.SOURCE_EXPORTED, e.TRANSFER_CALLED): s.SOCKET_WAITING,
        (s.DESTINATION_PREPARED, e.TRANSFER_CALLED): s.SOCKET_WAITING,
        (s.SOURCE_EXPORTED, e.SOCKET_GIVEN): s.SOCKET_READY,
        (s.DESTINATION_PREPARED, e.SOCKET_GIVEN): s.SOCKET_READY,
        (s.SOCKET_WAITING, e.SOCKET_GIVEN): s.SOCKET_READY,
        (s.SOCKET_READY, e.TRANSFER_STARTED): s.TRANSFERRING,
        (s.TRANSFERRING, e.MEMORY_COMPLETE): s.TRANSFER_COMPLETED,
        # The guest's memory was hashed on both sides and differs: complete, and yet of no use.
        (s.TRANSFER_COMPLETED, e.BROKEN): s.FAILED,
        # Nothing runs any more that could be stopped first.
        (s.TRANSFER_COMPLETED, e.CANCEL_CALLED): s.CANCELLED,
        (s.CANCELLING, e.CANCEL_DONE): s.CANCELLED,
        (s.TRANSFER_COMPLETED, e.FINALIZED): s.FINALIZED,
        (s.CANCELLED, e.FINALIZED): s.FINALIZED,
        (s.FAILED, e.FINALIZED): s.FINALIZED,
        # No (FINALIZED, BROKEN): what was decided stays decided.
        (s.CANCELLED, e.CLEANED): s.IDLE,
        (s.FAILED, e.CLEANED): s.IDLE,
        (s.FINALIZED, e.CLEANED): s.IDLE,
    }
    moves |= {(state, e.CANCEL_CALLED): s.CANCELLING for state in BEFORE_COMPLETION}
    moves |= {(state, e.BROKEN): s.FAILED for state in BEFORE_COMPLETION}
    return MappingProxyType(moves)


MOVES: Final = _moves()


def advance(state: State, event: Event) -> State:
    """The state after `event`.

    Raises:
        IllegalMove: no such move exists.
    """
    try:
        return MOVES[state, event]
    except KeyError:
        raise IllegalMove(f"a session that is {state.value} cannot become {event.value!r}") from None


@dataclass(frozen=True, slots=True)
class Standing:
    """What a shim knows about its session when a call arrives."""

    state: State
    session_id: str = ""
    """The active session's; in Idle the last ended one's, empty if there was none."""
    side: Side | None = None
    action: Action | None = None
    """What the session was finalized with, in Finalized and, for the last ended session, in Idle."""
    cancelled: bool = False
    """Somebody called Cancel in this session and it was done."""


def column(call: Call, side: Side | None) -> Column:
    """The column that `call` is looked up in on this side."""
    if call is Call.RESUME:
        return Column.FINALIZE_DESTINATION_RESUME if side is Side.DESTINATION else Column.FINALIZE_BACK
    if call is Call.STOP:
        return Column.FINALIZE_SOURCE_STOP if side is Side.SOURCE else Column.FINALIZE_BACK
    return Column[call.name]


def check(call: Call, standing: Standing, session_id: str | None) -> Outcome:
    """What becomes of `call` now. Returns one that does not refuse.

    `SAME_EXPORT` and `SAME_IMPORT` are returned for the caller to compare, and to refuse with `refusal` if what came
    is not the same.

    Args:
        session_id: the request's; None for Task.Create, which carries none.

    Raises:
        Rejected: `session_id` is not one, or is another than the active session's (named both).
        IllegalMove: not in this state; names the state and what it takes.
        AlreadyThere: there is a socket already.
    """
    if session_id is not None:
        check_session_id(session_id)
        _check_it_is_ours(standing, session_id)
    outcome = _look_up(call, standing, session_id)
    if outcome is Outcome.EXISTS:
        raise AlreadyThere(
            f"session {standing.session_id!r} is {standing.state.value}: it already has its socket, "
            f"and takes {takes(standing)}"
        )
    if outcome.refuses:
        raise refusal(call, standing)
    return outcome


def check_session_id(session_id: str) -> None:
    """Contract, 4.16: 1-256 bytes of printable UTF-8.

    Raises:
        Rejected: it is not.
    """
    size = len(session_id.encode(errors="surrogatepass"))
    if not 1 <= size <= SESSION_ID_BYTES_MAX:
        raise Rejected(f"session_id has {size} bytes; it must have 1 to {SESSION_ID_BYTES_MAX}")
    for position, character in enumerate(session_id):
        if character != " " and unicodedata.category(character)[0] in "CZ":
            raise Rejected(
                f"session_id holds U+{ord(character):04X} at position {position}, which cannot be printed"
            )


def refusal(call: Call, standing: Standing) -> IllegalMove:
    """The error that refuses `call`: it names the session, its state, and what that state takes."""
    if standing.state is State.IDLE:
        return IllegalMove(f"no active session: {call.value} needs one{_last_session(standing)}")
    done = f" with {standing.action.name}" if standing.action else ""
    return IllegalMove(
        f"session {standing.session_id!r} is {standing.state.value}{done}, which does not take {call.value}; "
        f"it takes {takes(standing)}"
    )


def takes(standing: Standing) -> str:
    """The calls that the state does not refuse, for a message."""
    row = LEGALITY[standing.state]
    taken = []
    for call in Call:
        outcome = row[column(call, standing.side)]
        if outcome.refuses or (outcome is Outcome.SAME_ACTION and call.action is not standing.action):
            continue
        again = " (the same again)" if outcome in _AGAIN else ""
        taken.append(f"{call.value}{again}")
    return ", ".join(taken)


_AGAIN: Final = (Outcome.SAME_EXPORT, Outcome.SAME_IMPORT, Outcome.SAME_ACTION, Outcome.NO_EFFECT)


def _check_it_is_ours(standing: Standing, session_id: str) -> None:
    if standing.state is not State.IDLE and session_id != standing.session_id:
        raise Rejected(
            f"session {session_id!r} is not the active one: {standing.session_id!r} is, {standing.state.value}"
        )


def _look_up(call: Call, standing: Standing, session_id: str | None) -> Outcome:
    outcome = LEGALITY[standing.state][column(call, standing.side)]
    if outcome is Outcome.SAME_ACTION:
        return Outcome.NO_EFFECT if call.action is standing.action else Outcome.ILLEGAL
    if standing.state is State.IDLE and standing.session_id and session_id == standing.session_id:
        # The last ended session: what ended it may be said again.
        if call.action is not None and call.action is standing.action:
            return Outcome.NO_EFFECT
        if call is Call.CANCEL and standing.cancelled:
            return Outcome.NO_EFFECT
    return outcome


def _last_session(standing: Standing) -> str:
    if not standing.session_id:
        return ""
    how = f" with {standing.action.name}" if standing.action else ""
    return f" (session {standing.session_id!r} has ended{how})"
