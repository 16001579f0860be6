"""One session's shell: feeds what happens to the pure protocol and carries out the steps that it orders, in order.

Nothing is decided here. A record is on disk before the step that follows it; a start of the virtual CPUs needs the
licence that only the protocol gives; a call is answered by the protocol's Reply and by nothing else. Events come from
calls, from the channel, from the VM and from the clock, and are handled one at a time.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, assert_never

from sandshift.errors import IllegalMove, PeerProtocolError, SandshiftError
from sandshift.session import phases
from sandshift.session.ids import Side
from sandshift.session.options import Bounds, Options
from sandshift.session.phases import Outcome, Told
from sandshift.session.record import BlackoutExited, Entry, Failure, Progress, Record
from sandshift.session.right import handle
from sandshift.session.right_model import (
    AskTimedOut,
    CallMade,
    ChannelLost,
    ChannelUp,
    DestroyVm,
    ForceResume,
    FrameRead,
    KeepLastStatement,
    Party,
    Refusal,
    Reply,
    Restarted,
    RightEvent,
    SendFrame,
    StartRefused,
    StartSucceeded,
    StartVcpus,
    Step,
    StopTransfer,
    TransferFailed,
    VmDied,
    WriteRecord,
    current_statement,
    restored_party,
)
from sandshift.session.right_model import Record as RightRecord
from sandshift.session.statement import Ask, Cell, FrameReader, Seal, Statement, frame
from sandshift.session.states import Call, Standing, State
from sandshift.shim.migration.channel import Channel
from sandshift.vmm.machine import Machine

log = logging.getLogger(__name__)

MEMORY_DIFFERS: Final = "the guest's memory here is not the source's: their digests differ"
FRAMES_WAITING_MAX: Final = 64
"""Frames that were read and are not handled yet. Beyond it no more are read: a peer that floods fills its own socket."""


def _retrieve(answer: asyncio.Future[Refusal | None]) -> None:
    if not answer.cancelled():
        answer.exception()


def first_ask_number() -> int:
    """Questions are counted on from a random 64-bit number in each process life; half the range is left to count in."""
    return secrets.randbits(63) | 1


class Host(Protocol):
    """What a session needs of its sandbox and its host: the side's own way of doing each step."""

    @property
    def machine(self) -> Machine | None: ...

    async def write_record(self, records: list[RightRecord]) -> None:
        """All of them durable when it returns, with one fsync."""
        ...

    def write_entry(self, entry: Entry) -> None:
        """Keep a notification; it survives the shim, not necessarily the host."""
        ...

    async def keep_statement(self, signed: bytes) -> None: ...

    async def last_record(self) -> RightRecord:
        """The newest record that is on disk, read from there."""
        ...

    async def look(self) -> Restarted:
        """What the VM shows, for a protocol that begins anew from its record."""
        ...

    def believes(self, statement: Statement) -> bool:
        """Destination with checksum verification: whether the memory here is the one that the statement describes."""
        ...

    def heard(self) -> None:
        """The first frame of the peer's has come: note it for a later shim, which need not hear another before it writes."""
        ...

    def about_to_start(self) -> None:
        """The right is here and on disk; the virtual CPUs are started next."""
        ...

    async def guest_runs(self) -> None:
        """The virtual CPUs run here, by a step of this session. Short: it is in the blackout."""
        ...

    async def stop_transfer(self) -> RightEvent | None:
        """End a transfer that is still going on, and wait until it has: ChannelLost if one was ended, MemoryComplete if it
        turns out to have completed, None if there was none."""
        ...

    async def destroy_vm(self) -> None: ...


@dataclass(slots=True)
class Transfer:
    """How far the transfer is; `done` resolves to None or to the error that TransferSandbox ends with."""

    done: asyncio.Future[SandshiftError | None]
    started: bool = False
    in_blackout: bool = False
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Destination: the first bytes are here."""


class Session:
    def __init__(
        self,
        party: Party,
        seal: Seal,
        host: Host,
        options: Options,
        bounds: Bounds,
        record: Record,
        *,
        now_us: Callable[[], int],
    ) -> None:
        self.party = party
        self.seal = seal
        self.options = options
        self.bounds = bounds
        self.record = record
        self.channel: Channel | None = None
        self.transfer = Transfer(asyncio.get_running_loop().create_future())
        self.used_head_only_calls = False
        """A call or shape of revision head was seen: its client ends the session with Cleanup."""
        self.warnings: list[str] = []
        self._last_word: Statement | None = None
        """The peer's RUNNING, once it has come over the channel: as good as its receipt, for it is never taken back. A
        destination of revision 2691 is done with its session, and its channel, as soon as it runs."""
        self._host = host
        self._now_us = now_us
        self._events: deque[tuple[RightEvent, asyncio.Future[None]]] = deque()
        self._task_drain: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Refusal | None] | None = None
        self._told = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self.heard = False
        """A frame of the peer's was read in this session, by this shim or one before it."""
        self._unsure = False
        """A step failed, and what is on disk and in the VM could not be looked at yet."""

    # What the desk asks

    @property
    def side(self) -> Side:
        return self.party.side

    @property
    def session_id(self) -> str:
        return self.seal.session_id

    @property
    def state(self) -> State:
        return self.party.state

    @property
    def standing(self) -> Standing:
        return self.party.record.standing

    def receipt(self) -> bytes:
        """This side's current statement, signed, for an orchestrator to carry."""
        return self.seal.sign(current_statement(self.party))

    def rehearse(self) -> None:
        """Sign a statement and read it: what is done for the first time takes a millisecond, and the next is in the blackout."""
        signed = self.seal.sign(current_statement(self.party))
        for one in FrameReader().feed(frame(signed)):
            self.seal.open_frame(one, side=self.side)

    async def call(self, call: Call, receipt: bytes = b"") -> None:
        """RESUME, STOP, CANCEL or CLEANUP, to its outcome. One at a time: the desk sees to it.

        Raises what the protocol replies; Rejected for a receipt that is not the peer's of this session.
        """
        opened = self.open_receipt(receipt) if receipt else self._last_word
        if opened is not None and not self._host.believes(opened):
            await self.feed(TransferFailed(MEMORY_DIFFERS))
        await self._answered(CallMade(call, opened))

    async def look_at_vm(self) -> None:
        """What is said of this side must not be said for a VM that is dead (right-to-run.md, rule 9)."""
        if self.party.vm_alive and not self._vm_alive():
            try:
                await self.feed(VmDied("its process has ended"))
            except SandshiftError as error:
                log.warning("session %s: %s", self.session_id, error)

    def open_receipt(self, receipt: bytes) -> Statement:
        return self.seal.open_receipt(receipt, side=self.side.peer)

    async def force(self, expected: Cell) -> None:
        """An operator takes the right to run; refused unless the cell is the one that they saw."""
        await self._answered(ForceResume(expected))

    async def _answered(self, event: CallMade | ForceResume) -> None:
        """Feed a call and wait for its Reply; a question that is not answered in time ends it."""
        answer = self._answer = asyncio.get_running_loop().create_future()
        # A step that fails is told to `feed` as well, which raises first.
        answer.add_done_callback(_retrieve)
        await self.feed(event)
        while not answer.done():
            pending = self.party.pending
            try:
                async with asyncio.timeout(self.bounds.handover_frame_s):
                    await asyncio.shield(answer)
            except TimeoutError:
                if (
                    pending is None
                    or self.party.pending is None
                    or pending.ask_number == self.party.pending.ask_number
                ):
                    await self.feed(AskTimedOut())
        refusal = answer.result()
        if refusal is not None:
            raise refusal.error()

    async def feed(self, event: RightEvent) -> None:
        """Let the protocol handle `event`, after those that wait already, and carry out what it orders.

        Returns when that is done; the work goes on if the caller is cancelled. A disk that cannot be written raises
        Unavailable, and nothing that the record was to allow has been done.
        """
        handled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events.append((event, handled))
        if self._task_drain is None or self._task_drain.done():
            self._task_drain = asyncio.create_task(self._drain(), name=f"session {self.session_id}")
        await asyncio.shield(handled)

    async def _drain(self) -> None:
        """Handle events until none waits. Each one's error goes to whoever fed it."""
        while self._events:
            event, handled = self._events.popleft()
            try:
                if self._unsure:
                    await self._look_anew()
                await self._handle(event)
            except Exception as error:  # noqa: BLE001 - handed on, not swallowed
                await self._begin_anew(error)
                if not handled.done():
                    handled.set_exception(error)
            else:
                if not handled.done():
                    handled.set_result(None)

    async def _begin_anew(self, error: Exception) -> None:
        """A step failed: nothing is assumed. The call is answered with the error, and the record on disk is what counts."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        try:
            await self._look_anew()
        except Exception:
            log.exception(
                "session %s: the state after a failed step cannot be told; the next event tries again",
                self.session_id,
            )

    async def _look_anew(self) -> None:
        self._unsure = True
        self.party = restored_party(await self._host.last_record(), next_ask=first_ask_number())
        await self._handle(await self._host.look())
        if self.channel is not None and self.channel.open:
            await self._handle(ChannelUp(self.heard))
        self._unsure = False

    def feed_soon(self, event: RightEvent) -> None:
        """`feed` from a callback. Errors are logged: there is no caller to tell, and the next call meets them again."""
        task = asyncio.get_running_loop().create_task(
            self.feed(event), name=f"session {type(event).__name__}"
        )
        self._background.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("session %s: %s", self.session_id, error, exc_info=error)
        if self.channel is not None and len(self._background) < FRAMES_WAITING_MAX:
            self.channel.go_on()

    # The protocol's steps

    async def _handle(self, event: RightEvent) -> None:
        alive = self._vm_alive()
        if self.party.vm_alive and not alive and not isinstance(event, VmDied):
            await self._handle(VmDied("its process has ended"))
            if isinstance(event, StartSucceeded | StartRefused):
                return  # That was what came of the start.
        party, steps = handle(replace(self.party, vm_alive=alive), event)
        for outcome in await self._carry_out(party, steps):
            await self._handle(outcome)

    def _vm_alive(self) -> bool:
        machine = self._host.machine
        if machine is None:
            imported = self.party.state is State.DESTINATION_IMPORTED  # which has none yet
            return imported and self.party.vm_alive
        return machine.alive

    async def _carry_out(self, party: Party, steps: tuple[Step, ...]) -> list[RightEvent]:
        """In order; answers what came of starts. The party counts as changed only once what it changed to is on disk."""
        queue = deque(steps)
        outcomes: list[RightEvent] = []
        if not any(isinstance(step, WriteRecord) for step in steps):
            self.party = party
        while queue:
            step = queue.popleft()
            if isinstance(step, WriteRecord):
                records = [step.record]
                while queue and isinstance(queue[0], WriteRecord):
                    records.append(queue.popleft().record)  # type: ignore[union-attr]
                await self._host.write_record(records)
                # What is on disk and no more: a cancellation is Cancelling until the transfer has been stopped.
                self.party = replace(party, record=records[-1])
            elif isinstance(step, StartVcpus):
                outcomes.append(await self._start(step.licence))
            elif isinstance(step, StopTransfer):
                if (outcome := await self._host.stop_transfer()) is not None:
                    outcomes.append(outcome)
            else:
                await self._do(step)
        return outcomes

    async def _do(self, step: SendFrame | DestroyVm | KeepLastStatement | Reply) -> None:
        match step:
            case SendFrame(statement):
                if self.channel is not None:
                    self.channel.send(self.seal.sign(statement))
            case DestroyVm():
                await self._host.destroy_vm()
            case KeepLastStatement(statement):
                await self._host.keep_statement(self.seal.sign(statement))
            case Reply(_, refusal):
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(refusal)
            case _:
                assert_never(step)

    async def _start(self, licence: object) -> RightEvent:
        machine = self._host.machine
        if machine is None:
            return VmDied("there is no VM")
        self._host.about_to_start()
        try:
            await machine.run_vcpus(licence)
        except IllegalMove as error:
            return StartRefused(error.message)
        except SandshiftError as error:
            if machine.alive:
                raise  # Whether it ran is not known: the step has failed.
            return VmDied(error.message)
        await self._host.guest_runs()
        return StartSucceeded()

    # The channel

    async def channel_is_free(self) -> None:
        """The own VM process has finished with the socket: frames may come and go."""
        if self.channel is not None:
            self.channel.begin(self._on_frame, self._on_channel_lost)
            if self.channel.open:
                await self.feed(ChannelUp(self.heard))

    def _on_frame(self, data: bytes) -> None:
        try:
            statement = self.seal.open_frame(data, side=self.side.peer)
        except PeerProtocolError as error:
            assert self.channel is not None
            self.channel.refuse(error.message)
            return
        if not self.heard:
            self.heard = True
            self._host.heard()
        if statement.cell is Cell.RUNNING:
            self._last_word = replace(statement, ask=Ask.NOTHING, ask_number=0, answers=0)
        if not self._host.believes(statement):
            self.feed_soon(TransferFailed(MEMORY_DIFFERS))
        self.feed_soon(FrameRead(statement))
        if self.channel is not None and len(self._background) >= FRAMES_WAITING_MAX:
            self.channel.pause()

    def _on_channel_lost(self, _why: str) -> None:
        self.feed_soon(ChannelLost())

    # The record

    def tell(
        self, told: Told, *, blackout: BlackoutExited | None = None, failure: Failure | None = None
    ) -> None:
        """What was told before is not told, and not written, again."""
        last_id = self.record.last_id
        entry = self.record.phase(told, self._now_us(), blackout=blackout, failure=failure)
        if entry.message_id > last_id:
            self._keep(entry)

    def tell_progress(self, numbers: Progress, *, now_s: float) -> None:
        entry = self.record.progress(numbers, self._now_us(), now_s=now_s)
        if entry is not None:
            self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        self._host.write_entry(entry)
        self._wake()

    def _wake(self) -> None:
        self._told.set()
        self._told = asyncio.Event()

    def close_record(self) -> None:
        self.record.close()
        self._wake()

    async def entries(self) -> AsyncIterator[Entry]:
        """The whole record, then what follows; ends when the session has."""
        seen = 0
        while True:
            told = self._told
            for entry in self.record.after(seen):
                yield entry
                seen = entry.message_id
            if self.record.closed:
                return
            await told.wait()

    async def changed(self) -> None:
        """Returns when something new has been told."""
        await self._told.wait()

    # The transfer's end

    def end_transfer(self, outcome: Outcome, message: str) -> None:
        """Tell how the transfer ended and let the waiting TransferSandbox go. Only the first call counts."""
        if self.transfer.done.done():
            return
        error = phases.error(outcome, self.side, message)
        told = phases.ending(outcome, self.side, in_blackout=self.transfer.in_blackout)
        failure = Failure(phases.code(outcome, self.side), message) if error is not None else None
        self.tell(told, failure=failure)
        self.transfer.done.set_result(error)

    async def close(self) -> None:
        """The session is over: let everything go."""
        if self.channel is not None:
            self.channel.close()
        self.end_transfer(Outcome.CANCELLED, "the session has ended")
        self.close_record()
