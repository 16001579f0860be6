"""What source and destination of a session do alike: keep the journal, take the socket, run the transfer in a task.

A side is the `Host` of its Session: it carries out, in its own way, what the protocol orders.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

from sandshift.errors import IllegalMove, SandshiftError
from sandshift.session.descriptor import Descriptor
from sandshift.session.descriptor import check as check_descriptor
from sandshift.session.phases import Outcome
from sandshift.session.record import Record
from sandshift.session.report import TIMELINE_MAX, Moment, Report, encode
from sandshift.session.right_model import Moved, Party, Restarted, RightEvent, TransferFailed, VmDied
from sandshift.session.right_model import Record as RightRecord
from sandshift.session.states import Event, State
from sandshift.shim.handed_socket import close_quietly, copy_descriptor, facts_of
from sandshift.shim.migration.books import CHANNEL_NOTE, HEAD_NOTE, NUMBER, OUTCOME_NOTE
from sandshift.shim.migration.channel import Channel
from sandshift.shim.migration.session import Session

if TYPE_CHECKING:
    from sandshift.sandbox.shape import MachineShape
    from sandshift.session.options import Bounds, Options
    from sandshift.session.record import Entry
    from sandshift.session.statement import Seal, Statement
    from sandshift.shim.migration.books import Books
    from sandshift.shim.sandbox import LiveSandbox
    from sandshift.vmm.machine import Machine, MachineEvent

log = logging.getLogger(__name__)

POLL_S: Final = 0.25
"""How often QEMU is asked how far it is, and limits are looked at."""


class SessionSide(ABC):
    def __init__(
        self,
        sandbox: LiveSandbox,
        books: Books,
        party: Party,
        seal: Seal,
        options: Options,
        bounds: Bounds,
        record: Record,
    ) -> None:
        self.sandbox = sandbox
        self.books = books
        self.options = options
        self.bounds = bounds
        self.session = Session(party, seal, self, options, bounds, record, now_us=sandbox.clock_us)
        self.socket_given = asyncio.Event()
        self.moments: list[Moment] = []
        """What happened when, for perf_tracing."""
        self.outcome: Outcome | None = None
        self.deadline_s = bounds.transfer_deadline_s
        """Of the transfer: the host's, or what TransferSandbox named."""
        self._began_s = time.monotonic()
        self._starting = asyncio.Lock()
        self._task_transfer: asyncio.Task[None] | None = None

    # What the Session asks of its host

    @property
    def machine(self) -> Machine | None:
        return self.sandbox.machine

    async def write_record(self, records: list[RightRecord]) -> None:
        await self.books.write_records(records)

    def write_entry(self, entry: Entry) -> None:
        self.books.write_entry(entry)

    async def keep_statement(self, signed: bytes) -> None:
        await self.books.keep_statement(signed)

    async def last_record(self) -> RightRecord:
        return await self.books.last_record()

    def believes(self, statement: Statement) -> bool:
        del statement
        return True

    def heard(self) -> None:  # noqa: B027 - not every side has something to do
        """A source need not have heard anything: it speaks first."""

    @abstractmethod
    async def look(self) -> Restarted: ...

    @abstractmethod
    async def stop_transfer(self) -> RightEvent | None: ...

    def about_to_start(self) -> None:
        self.moment("the right to run is here and on disk")

    @abstractmethod
    async def guest_runs(self) -> None: ...

    @abstractmethod
    async def destroy_vm(self) -> None: ...

    @property
    @abstractmethod
    def machine_shape(self) -> MachineShape | None:
        """The machine that moves."""

    def moment(self, what: str) -> None:
        if len(self.moments) < TIMELINE_MAX:
            self.moments.append(Moment(at_ms=(time.monotonic() - self._began_s) * 1000, what=what))

    @abstractmethod
    def report(self) -> Report: ...

    # The socket

    async def give_socket(self, descriptor: Descriptor) -> None:
        """Take a copy of the caller's socket. Refusals leave the session as it was."""
        copy = await asyncio.to_thread(copy_descriptor, descriptor.pid, descriptor.fd)
        try:
            check_descriptor(descriptor, facts_of(copy))
            machine = self.sandbox.machine
            if machine is not None:
                await machine.keep_channel(copy)
            # Before the record, and on disk with it: a later shim finds the channel by it.
            self.books.note_soon(CHANNEL_NOTE, NUMBER.pack(descriptor.cookie))
            await self.session.feed(Moved(Event.SOCKET_GIVEN))
        except BaseException:
            close_quietly(copy)
            raise
        self.session.channel = Channel(copy)
        self.socket_given.set()

    def head_was_seen(self) -> None:
        """A call, or the shape of one, that only clients of revision head make."""
        if not self.session.used_head_only_calls:
            self.session.used_head_only_calls = True
            self.books.note_soon(HEAD_NOTE, b"1")

    # The transfer

    async def transfer_called(self, socket_wait_s: float, deadline_s: float) -> None:
        """TransferSandbox was called: go on as soon as there is a socket."""
        if self.session.state in (State.SOURCE_EXPORTED, State.DESTINATION_PREPARED):
            await self.session.feed(Moved(Event.TRANSFER_CALLED))
        elif self.session.state is State.SOCKET_READY:
            await self._mark_called()
        self.deadline_s = deadline_s
        self.begin_transfer(socket_wait_s)

    async def _mark_called(self) -> None:
        try:
            await self.mark_started()
        except IllegalMove:
            if self.session.state is not State.FAILED:
                raise
            # The VM gave up as the call came: how the transfer has ended is the answer.

    def begin_transfer(self, socket_wait_s: float) -> None:
        """Let the transfer go on in a task of its own: it belongs to no call. Later calls join it."""
        if self._task_transfer is None:
            self.sandbox.parts.haste.begin()
            self.session.rehearse()
            self._task_transfer = asyncio.create_task(self._run(socket_wait_s), name="transfer")

    def watch_transfer_again(self) -> None:
        """Go on with a transfer that an earlier shim began."""
        self.sandbox.parts.haste.begin()
        self._task_transfer = asyncio.create_task(self._run(0.0, anew=False), name="transfer")

    async def _run(self, socket_wait_s: float, *, anew: bool = True) -> None:
        """Every error ends the transfer with an outcome; none leaves this task."""
        try:
            if not await self._wait_for_socket(socket_wait_s):
                return
            await self._transfer(anew=anew)
        except asyncio.CancelledError:
            raise
        except SandshiftError as error:
            await self.fail(Outcome.OWN_VM_FAILED, error.message)
        except Exception as error:
            log.exception("the transfer of session %s met a defect", self.session.session_id)
            await self.fail(
                Outcome.DEFECT, f"a defect of the shim: {type(error).__name__}; its log has the details"
            )

    async def _wait_for_socket(self, socket_wait_s: float) -> bool:
        """False if none came, or the transfer has ended meanwhile: cancelled, or its guest or VM has ended."""
        given: asyncio.Future[Any] = asyncio.ensure_future(self.socket_given.wait())
        done: asyncio.Future[Any] = self.session.transfer.done
        try:
            await asyncio.wait([given, done], timeout=socket_wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            given.cancel()
        if self.session.transfer.done.done():
            return False
        if not self.socket_given.is_set():
            await self.fail(
                Outcome.SOCKET_WAIT,
                f"no socket came within {socket_wait_s:g} s: call CreateDuplicateSocket on the {self.session.side.value}",
            )
            return False
        return True

    @abstractmethod
    async def _transfer(self, *, anew: bool) -> None: ...

    async def mark_started(self) -> None:
        """The session is Transferring, on disk too, when this returns. Idempotent."""
        async with self._starting:  # A call and the transfer's own task may come together.
            transfer = self.session.transfer
            if not transfer.started:
                transfer.started = True
                self._began_s = time.monotonic()
                self.session.record.transfer_started(self.sandbox.clock_us())
                await self.session.feed(Moved(Event.TRANSFER_STARTED))

    async def fail(self, outcome: Outcome, message: str) -> None:
        """The transfer has not come to a good end: the protocol first, then who waits."""
        self.sandbox.parts.haste.end()
        if self.session.state in (State.CANCELLING, State.CANCELLED):
            outcome, message = Outcome.CANCELLED, "the migration was cancelled"
        else:
            dead = self.sandbox.machine is not None and not self.sandbox.machine.alive
            try:
                await self.session.feed(VmDied(message) if dead else TransferFailed(message))
            except SandshiftError as error:
                # The disk is full, say: nothing has changed, the call is refused and can be repeated. Who waits must hear.
                log.error("session %s: %s", self.session.session_id, error)  # noqa: TRY400 - it says all
        self.end_transfer(outcome, message)

    def end_transfer(self, outcome: Outcome, message: str) -> None:
        """The first call counts."""
        if self.outcome is None:
            self.outcome = outcome
            self.books.note_soon(OUTCOME_NOTE, outcome.value.encode())
            self.moment(f"transfer: {outcome.value}")
        self.session.end_transfer(outcome, message)

    def cut_unused_channel(self) -> None:
        """Our VM has ended before it had everything: the other side's would wait for bytes until its deadline."""
        if self.session.channel is not None and not self.session.party.complete:
            self.session.channel.cut()

    def end_as_cancelled(self) -> None:
        """A Cancel, or a Finalize that goes back, was asked for and done: whoever waits for the transfer hears of it."""
        self.end_transfer(Outcome.CANCELLED, "the migration was cancelled")

    @abstractmethod
    async def settled(self) -> None:
        """Returns when what follows a decision has been done too."""

    @abstractmethod
    async def vm_died(self) -> None:
        """The VM process has ended by itself while the session is open."""

    async def stop_transfer_task(self) -> None:
        task = self._task_transfer
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def let_go(self) -> None:
        """This shim ends, the session does not: the VM holds the channel for the next one."""
        self.sandbox.parts.haste.end()
        await self.stop_transfer_task()
        if self.session.channel is not None:
            self.session.channel.close()

    async def close(self) -> None:
        """The session has ended: let go of everything but the VM and the record."""
        self.sandbox.parts.haste.end()
        await self.stop_transfer_task()
        if self.sandbox.machine is not None and self.sandbox.machine.alive:
            with contextlib.suppress(SandshiftError):
                await self.sandbox.machine.drop_channel()
        await self.session.close()
        try:
            await self.books.keep_report(encode(self.report()))
        except SandshiftError as error:
            # The key and the books must go all the same.
            log.warning("session %s has no report: %s", self.session.session_id, error)
        await self.books.close()


class EventQueue:
    """A VM's events with a clock: `next` gives an event, or None when `wait_s` have passed without one."""

    def __init__(self, machine: Machine) -> None:
        self._events: asyncio.Queue[MachineEvent] = asyncio.Queue()
        self._task = asyncio.create_task(self._pump(machine.events()), name="VM events")

    async def _pump(self, events: object) -> None:
        async for event in events:  # type: ignore[attr-defined]
            self._events.put_nowait(event)

    def put(self, event: MachineEvent) -> None:
        """One of our own, after those that have come."""
        self._events.put_nowait(event)

    async def next(self, wait_s: float) -> MachineEvent | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                return await self._events.get()
        return None

    def close(self) -> None:
        self._task.cancel()
