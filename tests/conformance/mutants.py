"""Servers that break the contract, one fault each, and the case that must notice.

A mutant is a patch of our server in this process: one for every cell of the table turned into another, at least one for
each promise, and one for each defect that is known of the original (reference: hcsshim) and that could be ours too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sandshift.conformance.answers import OK
from sandshift.conformance.cells import BY_RIGHT, name_of
from sandshift.conformance.table import CELLS, COLUMNS, STATES, sides_of
from sandshift.errors import IllegalMove, SandshiftError
from sandshift.session import options as option_rules
from sandshift.session import phases, right_source, saved, states
from sandshift.session.phases import Outcome as Ended
from sandshift.session.phases import Phase, PhaseState, Told
from sandshift.session.statement import Cell
from sandshift.session.states import Call, Column, Outcome, State
from sandshift.shim import sandbox_service, serve
from sandshift.shim.migration import desk, opening, pacing, restoring, session, side, source
from sandshift.shim.migration.destination import Destination
from sandshift.shim.sandbox import Life, LiveSandbox
from tests.conformance import mutants_aided, mutants_tasks  # noqa: F401 - they register their own
from tests.conformance.mutant import MUTANTS, Mutant, Patch, instead, nothing, wrong

# One for every cell ---------------------------------------------------------------------------------------------------

_COLUMNS = dict(zip(COLUMNS, Column, strict=True))
_LET_IN = {
    Column.PREPARE_AND_EXPORT: Outcome.SAME_EXPORT,
    Column.IMPORT: Outcome.SAME_IMPORT,
    Column.CREATE_DUPLICATE_SOCKET: Outcome.EXISTS,
    Column.NOTIFICATIONS: Outcome.PROCEED,
}
"""How a cell that refuses is turned into one that does not, so that nothing below refuses in its place."""


def _flipped(state: str, column: str) -> Outcome:
    row, says = states.LEGALITY[State(state)], CELLS[state][column]
    refuses = row[_COLUMNS[column]] is Outcome.ILLEGAL or says == "same"
    if says == "+ by right to run":
        refuses = BY_RIGHT[state, column] != OK
    return _LET_IN.get(_COLUMNS[column], Outcome.NO_EFFECT) if refuses else Outcome.ILLEGAL


def _cell(state: str, column: str) -> Patch:
    row = dict(states.LEGALITY[State(state)]) | {_COLUMNS[column]: _flipped(state, column)}
    return functools.partial(
        mock.patch.object, states, "LEGALITY", dict(states.LEGALITY) | {State(state): row}
    )


def cells() -> Iterator[Mutant]:
    for state in STATES:
        for column in COLUMNS:
            sides = sides_of(state, column)
            if sides:
                names = tuple(name_of(state, column, each) for each in sides)
                flipped = _flipped(state, column).value
                yield Mutant(f"{state} x {column}: {flipped!r}", "cell", _cell(state, column), names)


# Promises and defects -------------------------------------------------------------------------------------------------


@wrong(
    "4.1",
    "nothing is checked before the export",
    "export of a sandbox that cannot move is refused at once and changes nothing",
)
def _unchecked() -> Any:
    async def none(_sandbox: Any) -> list[Any]:
        return []

    return instead(opening, "source_blockers", none)


@wrong("4.2", "the saved state's digest is not compared", "a saved state that was damaged is DATA_LOSS")
def _undigested() -> Any:
    return instead(saved, "hmac", SimpleNamespace(compare_digest=lambda *_two: True))


@wrong(
    "4.2",
    "the saved state's version is not looked at",
    "a saved state of a version that is not read is refused with both ranges",
)
def _any_version() -> Any:
    return instead(saved, "_check_versions", lambda _envelope: None)


@wrong(
    "hcsshim 9e.28",
    "only the very same version is read",
    "a saved state of a version that old readers may read is read",
)
def _strict_version() -> Any:
    def strict(envelope: Any) -> None:
        if envelope.schema_version != saved.SCHEMA_VERSION:
            raise IllegalMove("another version")

    return instead(saved, "_check_versions", strict)


@wrong("4.3", "any sandbox_id is taken", "import with another sandbox_id than the shim's is refused")
def _any_sandbox() -> Any:
    return instead(saved, "_named_sandbox", lambda _raw, own: own)


@wrong(
    "4.5",
    "only the first blocker is named",
    "prepare names every blocker, changes nothing, and can be tried again",
)
def _first_blocker() -> Any:
    whole = opening.destination_blockers

    async def first(*what: Any, **named: Any) -> Any:
        blockers, warnings = await whole(*what, **named)
        return blockers[:1], warnings

    return instead(opening, "destination_blockers", first)


@wrong(
    "4.6",
    "the copied socket is not compared with its description",
    "a socket other than the one described is refused and harms nothing",
)
def _any_socket() -> Any:
    return instead(side, "check_descriptor", lambda _descriptor, _facts: None)


@wrong("4.7", "the transfer ends with its caller", "transfer of a client that goes away goes on")
def _callers_transfer() -> Any:
    whole = desk.Desk.transfer

    async def tied(self: desk.Desk, session_id: str, *bounds: float) -> None:
        try:
            await whole(self, session_id, *bounds)
        except asyncio.CancelledError:
            self._tasks.add(asyncio.get_running_loop().create_task(self._cancel(session_id)))
            raise

    return instead(desk.Desk, "transfer", tied)


@wrong(
    "4.7",
    "the destination receives only when it is called",
    "transfer on the source first, then on the destination",
)
def _called_receiver() -> Any:
    whole = desk.Desk._give_socket

    async def silent(self: desk.Desk, session_id: str, descriptor: Any) -> None:
        with instead(Destination, "begin_transfer", lambda *_what: None):
            await whole(self, session_id, descriptor)

    return instead(desk.Desk, "_give_socket", silent)


@wrong(
    "4.7",
    "the destination's call waits for a source that was not called",
    "transfer on the destination first, then on the source",
)
def _patient_destination() -> Any:
    return instead(desk, "ARRIVAL_S", 3600.0)


@wrong(
    "hcsshim 9a.1",
    "TransferSandbox answers at once and swallows failures",
    "transfer whose channel breaks answers UNAVAILABLE",
)
def _hasty() -> Any:
    async def hasty(self: desk.Desk, session_id: str, *bounds: float) -> None:
        await self.begin_transfer(session_id, *bounds)
        self.require_active().head_was_seen()

    return instead(desk.Desk, "transfer", hasty)


@wrong(
    "4.8",
    "a new subscriber hears the newest alone",
    "notifications are recorded from the start and told to whoever comes",
)
@wrong(
    "hcsshim 9d.26",
    "only the last event is replayed",
    "notifications have ids that strictly increase, and their times",
    "phases of a success",
)
def _newest_alone() -> Any:
    whole = session.Session.entries

    async def newest(self: session.Session) -> Any:
        last = max((entry.message_id for entry in self.record.entries), default=0)
        async for entry in whole(self):
            if entry.message_id >= last:
                yield entry

    return instead(session.Session, "entries", newest)


@wrong(
    "hcsshim 9d.26",
    "the stream is not closed at the session's end",
    "the stream of notifications ends when Cleanup ends the session",
)
def _endless() -> Any:
    return instead(session.Session, "close_record", lambda _self: None)


@wrong(
    "hcsshim 9a.2", "start_time is not the transfer's", "notifications before the transfer have no start_time"
)
def _early_start() -> Any:
    whole = opening.Record

    def started(which: Any) -> Any:
        record = whole(which)
        record.transfer_started(1)
        return record

    return instead(opening, "Record", started)


@wrong("4.9", "a cancellation is told as a failure of the source", "phases of a cancellation")
@wrong(
    "hcsshim 9b.13",
    "a Cancel yields SOURCE_FAILED",
    "the stream of notifications ends when Cleanup ends the session",
)
def _blamed() -> Any:
    whole = phases.ending

    def blamed(outcome: Ended, *what: Any, **named: Any) -> Told:
        if outcome is Ended.CANCELLED:
            return Told(Phase.FAILED, PhaseState.SOURCE_FAILED)
        return whole(outcome, *what, **named)

    return instead(phases, "ending", blamed)


@wrong("4.9", "a roll-back is not told", "phases of a roll-back")
def _silent_recovery() -> Any:
    return instead(source.Source, "rolled_back", nothing)


@wrong(
    "4.10",
    "Cancel answers while the transfer goes on",
    "Cancel is done when it answers, and closes the transport",
)
@wrong(
    "hcsshim 9a.3",
    "Cancel leaves the transport open",
    "Cancel is done when it answers, and closes the transport",
)
def _still_going() -> Any:
    return instead(source.Source, "stop_transfer", nothing)


@wrong("hcsshim 9b.15", "a second Cancel answers before the first is done", "cell Cancelling x Cancel (SRC)")
def _hasty_cancel() -> Any:
    whole = desk.Desk.cancel

    async def hasty(self: desk.Desk, session_id: str) -> None:
        if self.standing.state is not State.CANCELLING:
            await whole(self, session_id)

    return instead(desk.Desk, "cancel", hasty)


@wrong(
    "hcsshim 9b.12", "Cancel is taken after Finalize", "Cancel after Finalize is refused and changes nothing"
)
def _late_cancel() -> Any:
    return _cell("Finalized", "Cancel")()


@wrong(
    "4.11",
    "a Finalize that failed cannot be tried again",
    "Finalize that failed can be tried until it succeeds",
)
@wrong("hcsshim 9b.8", "no retry of Finalize(RESUME)", "Finalize that failed can be tried until it succeeds")
def _one_try() -> Any:
    whole, failed = desk.Desk._finalize, set()

    async def once(self: desk.Desk, session_id: str, *what: Any) -> None:
        if (id(self), session_id) in failed:
            raise IllegalMove("it failed before")
        try:
            await whole(self, session_id, *what)
        except SandshiftError:
            failed.add((id(self), session_id))
            raise

    return instead(desk.Desk, "_finalize", once)


@wrong(
    "4.12",
    "Cleanup ends the session and nothing else",
    "Cleanup from Failed runs the guest on the source and discards the destination's",
)
@wrong(
    "hcsshim 9a.4",
    "Cleanup only forgets",
    "Cleanup from Cancelled after completion runs the guest on the source",
)
def _forgetful_cleanup() -> Any:
    whole = desk.Desk._decide

    async def decide(self: desk.Desk, active: Any, call: Call, receipt: bytes = b"") -> None:
        if call is not Call.CLEANUP:
            await whole(self, active, call, receipt)

    return instead(desk.Desk, "_decide", decide)


@wrong("hcsshim 9a.5", "a discarded VM stays", "cell DestinationPrepared x Finalize back (DST)")
def _kept_vm() -> Any:
    return instead(Destination, "destroy_vm", nothing)


@wrong(
    "hcsshim 9b.19",
    "a destination is good for one import",
    "an aborted import leaves the shim as it was, for another session",
)
def _single_use() -> Any:
    whole = LiveSandbox.abandon_incoming

    async def used_up(self: LiveSandbox) -> None:
        await whole(self)
        self.life = Life.STOPPED

    return instead(LiveSandbox, "abandon_incoming", used_up)


@wrong("hcsshim 9f.36", "the exit code of what moved away is another", "what has moved away is told")
def _other_exit() -> Any:
    return instead(source, "EXIT_MIGRATED", 0)


@wrong(
    "4.13",
    "the sandbox can be changed while it moves",
    "what would change the sandbox is refused at once while it moves",
)
def _changeable() -> Any:
    return instead(desk.Desk, "require_no_session", lambda _self, _what: None)


@wrong(
    "hcsshim 9f.37",
    "SandboxStatus says nothing of the session",
    "what would change the sandbox is refused at once while it moves",
)
def _no_info() -> Any:
    return instead(sandbox_service.SandboxService, "_info", lambda _self: {})


@wrong("hcsshim 9c.22", "other calls wait for the transfer", "cell Transferring x Cancel (SRC)")
def _blocking() -> Any:
    whole = desk.Desk.transfer

    async def in_turn(self: desk.Desk, session_id: str, *bounds: float) -> None:
        await self.begin_transfer(session_id, *bounds)
        async with self._turn:
            await asyncio.shield(self.require_active().session.transfer.done)
        await whole(self, session_id, *bounds)

    return instead(desk.Desk, "transfer", in_turn)


@wrong(
    "hcsshim 9c.21", "a subscriber blocks the other calls", "a subscriber that does not read holds up nobody"
)
def _blocking_subscriber() -> Any:
    whole = desk.Desk.notifications

    async def in_turn(self: desk.Desk, session_id: str) -> Any:
        async with self._turn:
            async for entry in whole(self, session_id):
                yield entry

    return instead(desk.Desk, "notifications", in_turn)


@wrong(
    "hcsshim 9c.20",
    "Notifications with an empty id meets a shim without a session",
    "session ids are checked, and never part of a path",
)
def _unguarded() -> Any:
    async def unguarded(self: desk.Desk, session_id: str) -> Any:
        del session_id
        async for entry in self.require_active().session.entries():
            yield entry

    return instead(desk.Desk, "notifications", unguarded)


@wrong("4.14", "options out of range are taken", "options out of range are refused by name, value and range")
@wrong(
    "hcsshim 9e.33", "options are not validated", "options out of range are refused by name, value and range"
)
def _any_options() -> Any:
    return instead(option_rules, "_range_problems", lambda _params: ())


@wrong(
    "4.14", "options that must agree need not", "options that must agree and do not are refused, naming both"
)
def _disagreeing() -> Any:
    return instead(option_rules, "disagreements", lambda _source, _destination: [])


@wrong("4.14", "foreign compatibility_data is taken", "2691 compatibility_data is the blob's own or refused")
def _any_compatibility() -> Any:
    whole = option_rules.parse

    def parse(message: Any, *, backend: Any, own_compatibility_data: Any = ()) -> Any:
        mine = (message.compatibility_data.data,) if message is not None else own_compatibility_data
        return whole(message, backend=backend, own_compatibility_data=mine)

    return instead(option_rules, "parse", parse)


@wrong("4.15", "a restarted shim knows no session", "a session survives both its shims")
@wrong("hcsshim 9e.32", "nothing of a session is kept on disk", "a session survives both its shims")
def _forgetful_shim() -> Any:
    return instead(restoring, "restore_session", nothing)


@wrong("4.16", "any session id is taken", "session ids are checked, and never part of a path")
@contextlib.contextmanager
def _any_id() -> Iterator[None]:
    with (
        instead(states, "check_session_id", lambda _named: None),
        instead(opening, "session_id", lambda named: named),
    ):
        yield


@wrong(
    "hcsshim 9a.7",
    "a refusal comes back as UNKNOWN",
    "session ids are checked, and never part of a path",
    "cell Idle x Cancel (SRC)",
)
def _unknown() -> Any:
    import ttrpc  # noqa: PLC0415

    return instead(serve, "to_status", lambda error: ttrpc.StatusError(ttrpc.Code.UNKNOWN, str(error)))


@wrong("hcsshim 9e.31", "receipts are not verified", "Finalize with a receipt of another session is refused")
def _unverified() -> Any:
    return instead(session.Session, "open_receipt", lambda _self, _receipt: None)


@wrong("hcsshim 9e.32", "a source resumes beside a destination that runs", "Finalize never makes two runners")
def _two_runners() -> Any:
    def take_back(turn: Any, _statement: Any) -> None:
        turn.write(cell=Cell.KEPT)
        turn.start()

    sees = dict(right_source.SEES) | {(Cell.RELEASED, Cell.RUNNING): take_back}
    return instead(right_source, "SEES", sees)


@wrong("5", "nobody watches over forgotten sessions", "limit: a session that nobody asks for ends by itself")
@wrong(
    "hcsshim 9e.32",
    "no watchdog when the orchestrator disappears",
    "limit: a session that nobody asks for ends by itself",
)
def _no_watchdog() -> Any:
    whole = desk.Desk._watch_for_orphan

    async def asleep(self: desk.Desk, _active: Any) -> None:
        with instead(desk, "ORPHAN_LOOK_S", 3600.0):
            await whole(self, _active)

    return instead(desk.Desk, "_watch_for_orphan", asleep)


@wrong(
    "5",
    "limits do not count before the VMs have agreed",
    "limit: a transfer beyond its deadline is cancelled with DEADLINE_EXCEEDED",
)
def _no_limit_in_setup() -> Any:
    return instead(pacing.Pacer, "in_setup", lambda _self, _now_s: None)


@wrong("5", "any number may subscribe", "limit: one subscriber too many is RESOURCE_EXHAUSTED")
def _any_number() -> Any:
    async def subscribed(_self: desk.Desk, entries: Any) -> Any:
        async for entry in entries:
            yield entry

    return instead(desk.Desk, "_subscribed", subscribed)


@wrong("5", "any number of containers may come", "limit: one container too many is RESOURCE_EXHAUSTED")
def _any_containers() -> Any:
    return instead(opening, "require_room", lambda *_what: None)


@wrong(
    "3 (2691)",
    "a session of 2691 waits for a Cleanup that never comes",
    "2691 abort from SourceExported (SRC)",
)
def _waiting_for_cleanup() -> Any:
    whole = desk.Desk._finalize

    async def finalize(self: desk.Desk, *what: Any) -> None:
        if self.active is not None:
            self.active.session.used_head_only_calls = True
        await whole(self, *what)

    return instead(desk.Desk, "_finalize", finalize)


@wrong("3 (2691)", "RUNNING is forgotten with its channel", "2691 a whole move")
def _forgotten_word() -> Any:
    whole = session.Session.call

    async def call(self: session.Session, which: Call, receipt: bytes = b"") -> None:
        self._last_word = None
        await whole(self, which, receipt)

    return instead(session.Session, "call", call)


@wrong("1 (2691)", "config is looked for in field 3 alone", "2691 a whole move")
def _head_alone() -> Any:
    whole = saved.read_import

    def head(request: Any, *, own: Any) -> Any:
        read = whole(request, own=own)
        if read.revision is not saved.Revision.HEAD:
            raise IllegalMove("field 3 is empty")
        return read

    return instead(saved, "read_import", head)


@wrong(
    "3", "the last session is forgotten", "the last session's Finalize, Cancel and Cleanup again are no error"
)
def _no_memory() -> Any:
    whole = states._look_up

    def look_up(call: Call, standing: Any, session_id: Any) -> Outcome:
        if standing.state is State.IDLE:
            standing = replace(standing, session_id="")
        return whole(call, standing, session_id)

    return instead(states, "_look_up", look_up)


def everyone() -> list[Mutant]:
    return [*cells(), *MUTANTS]
