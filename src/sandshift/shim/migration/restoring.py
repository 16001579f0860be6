"""A session that an earlier shim left open: its journal read, its side made again, its end of the channel found.

The protocol hears what the VM shows (right-to-run.md, section 7), and a transfer that goes on is watched again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from google.protobuf.any_pb2 import Any as AnyMessage

from sandshift.errors import Damaged, SandshiftError, Unavailable
from sandshift.sandbox import codec
from sandshift.sandbox.patching import Patching
from sandshift.session import options as option_rules
from sandshift.session import saved
from sandshift.session.ids import SessionId
from sandshift.session.phases import Outcome
from sandshift.session.right_model import Restarted, restored_party
from sandshift.session.right_model import Transfer as TransferState
from sandshift.session.statement import Seal
from sandshift.session.states import Side, State
from sandshift.shim.handed_socket import close_quietly, copy_descriptor, facts_of
from sandshift.shim.migration.books import (
    CHANNEL_NOTE,
    HEAD_NOTE,
    HEARD_NOTE,
    NUMBER,
    OUTCOME_NOTE,
    STOPPED_NOTE,
    Books,
)
from sandshift.shim.migration.channel import Channel
from sandshift.shim.migration.destination import Destination
from sandshift.shim.migration.last import keep_end
from sandshift.shim.migration.session import first_ask_number
from sandshift.shim.migration.source import Source
from sandshift.shim.restore import ends
from sandshift.status import error_of
from sandshift.wire.migration import options_pb2
from ttrpc import Code

if TYPE_CHECKING:
    from sandshift.shim.sandbox import LiveSandbox

log = logging.getLogger(__name__)

WITHOUT_CHANNEL: Final = (
    State.SOURCE_EXPORTED,
    State.DESTINATION_IMPORTED,
    State.DESTINATION_PREPARED,
    State.SOCKET_WAITING,
)
"""In these a note of a channel is of one that was not taken after all."""


async def restore_session(sandbox: LiveSandbox) -> Source | Destination | None:
    """The side of the session that an earlier shim left, going on; None if it left none.

    Raises:
        Damaged: its books cannot be believed. Nothing is overwritten, the VM is left as it is.
    """
    books = await sandbox.disk.run(lambda: Books.read(sandbox.places, sandbox.disk))
    if books is None:
        return None
    active = _side(sandbox, books)
    if active.session.state is State.IDLE:
        # An earlier shim died in Cleanup: what it was about to do.
        await keep_end(sandbox.disk, sandbox.places.last_session_file, active.session)
        await books.close()
        return None
    _take_notes(active)
    await _take_channel_back(active)
    restarted = await _look(active)
    if active.session.state is State.SOCKET_READY and restarted.transfer is TransferState.COMPLETED:
        await active.mark_started()  # began and ended while no shim was there
    await active.session.feed(restarted)
    if restarted.transfer is not TransferState.GOING_ON and active.session.channel is not None:
        await active.session.channel_is_free()
    await _go_on(active, restarted)
    if isinstance(active, Destination):
        active.ran_before()
    if not restarted.vm_alive or _has_ended(active):
        await active.vm_died()
    return active


async def _look(active: Source | Destination) -> Restarted:
    try:
        return await active.look()
    except Unavailable:
        machine = active.sandbox.machine
        if machine is None or not await ends(machine):
            raise
        return await active.look()  # It ended as it was asked.


def _has_ended(active: Source | Destination) -> bool:
    machine = active.sandbox.machine
    return machine is not None and not machine.alive


def _side(sandbox: LiveSandbox, books: Books) -> Source | Destination:
    opened, right = books.state.opened, books.state.right_record
    if opened is None or right is None:
        raise Damaged(f"{sandbox.places.journal_file} does not say where its session stands")
    options = option_rules.parse(
        options_pb2.InitializeOptions.FromString(opened.options), backend=option_rules.ANY_BACKEND
    )
    bounds = option_rules.limits(options, sandbox.config.migration.limits)
    party = restored_party(right, next_ask=first_ask_number())
    seal = Seal(opened.session_id, books.session_key)
    record = books.state.notification_record()
    if right.side is Side.SOURCE:
        return Source(sandbox, books, party, seal, options, bounds, record)
    destination = Destination(sandbox, books, party, seal, options, bounds, record)
    state = saved.decode(AnyMessage.FromString(books.config), expected=SessionId(opened.session_id))
    model = codec.sandbox_from_proto(state.sandbox).moved_into(sandbox.sandbox_id)
    destination.patching = Patching(model)
    destination.shape = codec.shape_from_proto(state.machine)
    destination.exported_at_us = state.exported_at_us
    return destination


def _take_notes(active: Source | Destination) -> None:
    notes = active.books.state.notes
    active.session.used_head_only_calls = HEAD_NOTE in notes
    active.session.heard = HEARD_NOTE in notes
    if isinstance(active, Source):
        if STOPPED_NOTE in notes:
            (active.stopped_at_us,) = NUMBER.unpack(notes[STOPPED_NOTE])
            active.session.transfer.in_blackout = True
        if active.books.state.streams is not None:
            active.offsets = {
                (process, stream): at for process, stream, at in active.books.state.streams.offsets
            }
    else:
        active.take_notes(notes)
    ending = active.session.record.ending
    if ending is not None:
        error = None
        if ending.failure is not None:
            error = error_of(Code(ending.failure.code), ending.failure.message)
        active.session.transfer.done.set_result(error)
    if OUTCOME_NOTE in notes:
        active.outcome = Outcome(notes[OUTCOME_NOTE].decode())
    active.session.transfer.started = active.session.state not in (*WITHOUT_CHANNEL, State.SOCKET_READY)


async def _take_channel_back(active: Source | Destination) -> None:
    """QEMU holds a copy of the channel under a name; it is known by its cookie."""
    machine = active.sandbox.machine
    cookie = active.books.state.notes.get(CHANNEL_NOTE)
    if machine is None or cookie is None or active.session.state in WITHOUT_CHANNEL:
        return
    copy = await asyncio.to_thread(find_socket, machine.channel_keeper_pid, NUMBER.unpack(cookie)[0])
    if copy is None:
        log.warning("the channel of session %s is gone; receipts will do", active.session.session_id)
        return
    active.session.channel = Channel(copy)
    active.socket_given.set()


def find_socket(pid: int, cookie: int) -> int | None:
    """A copy of the socket with that SO_COOKIE, taken from process `pid`; None if it has none. Blocks."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError, SandshiftError):
            if not str(link.readlink()).startswith("socket:"):
                continue
            copy = copy_descriptor(pid, int(link.name))
            with contextlib.suppress(SandshiftError):
                if facts_of(copy).cookie == cookie:
                    return copy
            close_quietly(copy)
    return None


async def _go_on(active: Source | Destination, restarted: Restarted) -> None:
    """Watch a transfer that goes on; wait for a socket that was being waited for."""
    if isinstance(active, Source) and restarted.transfer is TransferState.GOING_ON:
        active.socket_given.set()  # QEMU has its end, with or without ours: receipts will do.
    needs_channel = active.session.state in (State.SOCKET_READY, State.TRANSFERRING)
    if needs_channel and active.session.channel is None and not active.socket_given.is_set():
        await active.fail(Outcome.PEER_LOST, "the channel did not outlive the shim before this one")
    elif active.session.state is State.TRANSFERRING or restarted.transfer is TransferState.GOING_ON:
        active.watch_transfer_again()
    elif active.session.state is State.SOCKET_WAITING:
        active.begin_transfer(active.bounds.socket_wait_s)
    elif active.session.state is State.SOCKET_READY and isinstance(active, Destination):
        active.watch_transfer_again()
    else:
        _tell_what_was_missed(active, restarted)


def _tell_what_was_missed(active: Source | Destination, restarted: Restarted) -> None:
    """The transfer ended while no shim was there."""
    if active.session.transfer.done.done():
        return
    match active.session.state:
        case State.TRANSFER_COMPLETED:
            if isinstance(active, Source):
                active.tell_success()
            active.end_transfer(Outcome.SUCCESS, "")
        case State.FAILED:
            outcome = Outcome.PEER_LOST if restarted.vm_alive else Outcome.OWN_VM_FAILED
            active.end_transfer(outcome, active.session.party.record.reason)
        case State.CANCELLED | State.FINALIZED:
            active.end_as_cancelled()
        case _:
            pass
