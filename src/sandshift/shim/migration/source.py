"""The source's side of a session: export, send, settle at the switchover, and afterwards stop or take back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from sandshift.errors import SandshiftError, Unavailable
from sandshift.session import phases
from sandshift.session.blackout import SourceStamps, split
from sandshift.session.phases import Outcome, Phase, PhaseState, Told
from sandshift.session.report import ChecksumReport, Report
from sandshift.session.right_model import ChannelLost, MemoryComplete, Restarted, RightEvent, VmDied
from sandshift.session.right_model import Transfer as TransferState
from sandshift.session.statement import Cell
from sandshift.session.states import BEFORE_COMPLETION, State
from sandshift.shim.migration.books import NUMBER, STOPPED_NOTE
from sandshift.shim.migration.pacing import Pacer, StopSending
from sandshift.shim.migration.reporting import report_of
from sandshift.shim.migration.side import POLL_S, EventQueue, SessionSide
from sandshift.shim.restore import ends, follow_again
from sandshift.shim.sandbox import EXIT_KILLED, EXIT_MIGRATED, GUEST_ENDED
from sandshift.vmm.machine import ChannelSecurity, MachineEvent, MigrationStatus, RunState
from sandshift.wire.sandshift import state_pb2

if TYPE_CHECKING:
    from sandshift.sandbox.shape import MachineShape
    from sandshift.vmm.machine import Machine, MigrationInfo

log = logging.getLogger(__name__)


LAST_LOOK_S: Final = 0.5
"""For QEMU's sums once its guest is gone; they are not worth waiting for."""
HANGS_S: Final = 2.0
"""A QEMU that has not answered for so long when its transfer is to end may wait for its channel."""
LOOKED: Final = "LOOKED"
"""Our own event: the answer to a look at QEMU is here."""
SENT_AWAY: Final = frozenset({RunState.FINISH_MIGRATE, RunState.POSTMIGRATE})
"""States of a guest that a transfer of its own has stopped; QEMU says `completed` a moment before the second."""


class Source(SessionSide):
    stopped_at_us = 0
    """When the guest stopped for the last pass: QEMU's stamp, this host's clock."""
    offsets: dict[tuple[str, int], int] = {}  # noqa: RUF012 - replaced, never changed
    memory_digest = b""
    pacer: Pacer | None = None
    checksum_ms = 0.0
    _continued_at_us = 0
    _told_setup = False
    _shape: MachineShape | None = None
    _completed_at_us = 0
    """QEMU's MIGRATION completed: its stamp, this host's clock."""
    _completed_at_s = 0.0
    """The same by this shim's monotonic clock."""
    _downtime_us = 0
    """QEMU's count, of a transfer that completed."""
    _task_follow: asyncio.Task[None] | None = None
    _task_look: asyncio.Task[None] | None = None

    @functools.cached_property
    def _sending(self) -> asyncio.Lock:
        """Held while a transfer is being begun: QEMU says nothing of it until it has."""
        return asyncio.Lock()

    @property
    def guest_is_here(self) -> bool:
        """It has not been stopped for its last pass, nor been given away: what is asked of it is answered here."""
        session = self.session
        mine = session.party.cell in (Cell.OPEN, Cell.KEPT)
        return mine and not (session.transfer.in_blackout or session.party.complete)

    @property
    def moved_to(self) -> str:
        """Where the guest went: session and destination, as far as the channel tells."""
        channel = self.session.channel
        where = channel.peer if channel is not None else ""
        return f"session {self.session.session_id}" + (f", {where}" if where else "")

    # The transfer

    async def _transfer(self, *, anew: bool) -> None:
        machine = self.sandbox.require_machine()
        self._shape = machine.shape
        assert self.session.channel is not None or not anew
        await self.mark_started()
        pacer = self.pacer = Pacer(
            self.sandbox.config,
            self.options,
            replace(self.bounds, transfer_deadline_s=self.deadline_s),
            memory_bytes=machine.shape.memory_bytes,
            now_s=time.monotonic(),
        )
        events = EventQueue(machine)
        try:
            if anew:
                security = ChannelSecurity(self.books.session_key if self.books.encrypted else b"")
                assert self.session.channel is not None
                async with self._sending:
                    if self.session.state is not State.TRANSFERRING:
                        return  # Cancelled before a byte went: nothing may go now.
                    with self.session.channel.lent() as channel_fd:
                        await machine.migrate_out(channel_fd, security, pacer.settings)
            else:
                await self._on_status(machine, pacer, (await machine.migration_info()).status)
            while not self.session.transfer.done.done():
                wait_s = POLL_S if self._task_look else pacer.next_look_s(time.monotonic())
                event = await events.next(wait_s)
                try:
                    await self._on_event(machine, pacer, events, event)
                except Unavailable:
                    if not await ends(machine):
                        self.cut_unused_channel()  # See _info_or_cut.
                        raise
                    # Its last events, which say why, are still to come.
        except StopSending as rule:
            await self._give_up(machine, rule)
        finally:
            events.close()
            await self._stop_looking()

    async def _on_event(
        self, machine: Machine, pacer: Pacer, events: EventQueue, event: MachineEvent | None
    ) -> None:
        if event is not None and event.name != LOOKED:
            self.moment(
                f"source {event.name} {event.data.get('status', event.data.get('pass', ''))}".rstrip()
            )
        match event.name if event else "tick":
            case "MIGRATION_PASS" if self.session.transfer.in_blackout and not pacer.wants_estimate:
                pass  # The last one: nothing can follow from it.
            case "tick" | "MIGRATION_PASS":
                self._look_soon(machine, pacer, events)
            case name if name == LOOKED:
                self._looked()
            case "STOP":
                assert event is not None
                self._guest_stopped(event.at_us)
                pacer.guest_stopped(time.monotonic())
            case "MIGRATION":
                assert event is not None
                await self._on_status(
                    machine, pacer, MigrationStatus(str(event.data["status"])), at_us=event.at_us
                )
            case "DEAD":
                await self.fail(*self._why_dead())
            case name if name in GUEST_ENDED:
                assert event is not None
                self.sandbox.note_guest_end(event)

    def _why_dead(self) -> tuple[Outcome, str]:
        if self.sandbox.guest_ended:
            return Outcome.GUEST_RESET, f"the guest ended while it moved ({self.sandbox.guest_ended})"
        return Outcome.OWN_VM_FAILED, "the source's VM process has died"

    def _guest_stopped(self, at_us: int) -> None:
        if not self.session.transfer.in_blackout:
            self.stopped_at_us = at_us
            self.session.transfer.in_blackout = True
            self.books.note_soon(STOPPED_NOTE, NUMBER.pack(at_us))
            self.session.tell(Told(Phase.BLACKOUT_STARTED, PhaseState.SUCCESS))

    async def _on_status(
        self, machine: Machine, pacer: Pacer, status: MigrationStatus, *, at_us: int = 0
    ) -> None:
        """`at_us`: QEMU's stamp; 0 if it has been so since nobody knows when."""
        match status:
            case MigrationStatus.ACTIVE:
                self._setup_is_done()
            case MigrationStatus.PRE_SWITCHOVER:
                await self._settle(machine, pacer)
            case MigrationStatus.COMPLETED:
                self._completed_at_us, self._completed_at_s = at_us, time.monotonic()
                if not at_us:
                    self._note_downtime(await machine.migration_info())
                await self._completed()
            case MigrationStatus.FAILED | MigrationStatus.CANCELLED:
                await self._not_completed(machine)

    def _setup_is_done(self) -> None:
        """Told once, and before any progress, whichever of QEMU's words came first."""
        if not self._told_setup:
            self._told_setup = True
            self.session.tell(Told(Phase.SETUP_DONE, PhaseState.SUCCESS))

    def _look_soon(self, machine: Machine, pacer: Pacer, events: EventQueue) -> None:
        """Look without keeping an event waiting: the guest may stop before QEMU answers. One look at a time."""
        if self._task_look is None:
            self._task_look = asyncio.create_task(self._look(machine, pacer), name="look at QEMU")
            self._task_look.add_done_callback(lambda _: events.put(MachineEvent(LOOKED, {}, 0)))

    def _looked(self) -> None:
        """Raises what the look did: StopSending, or Unavailable if QEMU did not answer."""
        task, self._task_look = self._task_look, None
        if task is not None:
            task.result()

    async def _stop_looking(self) -> None:
        if (task := self._task_look) is not None:
            self._task_look = None
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # The transfer has ended: nothing follows from it.

    async def _look(self, machine: Machine, pacer: Pacer) -> None:
        """Ask how far QEMU is, tell it, and let the rules act."""
        info = await machine.migration_info()
        if info.status is MigrationStatus.SETUP:
            pacer.in_setup(time.monotonic())
        if info.status not in (
            MigrationStatus.ACTIVE,
            MigrationStatus.DEVICE,
            MigrationStatus.PRE_SWITCHOVER,
        ):
            return
        if self.session.party.complete or self.session.transfer.done.done():
            return  # The end came before the answer.
        now_s = time.monotonic()
        self._setup_is_done()
        progress, settings = pacer.on_info(info, now_s=now_s)
        self.session.tell_progress(progress, now_s=now_s)
        if settings is not None:
            await machine.tune(settings)

    async def _settle(self, machine: Machine, pacer: Pacer) -> None:
        """The guest is stopped and all but the rest is out: the last moment to turn back by ourselves."""
        if pacer.wants_estimate:
            pacer.before_switchover(await machine.migration_info(), now_s=time.monotonic())
        if self.options.checksum_verification:
            began_s = time.monotonic()
            self.memory_digest = await machine.memory_digest()
            self.checksum_ms = (time.monotonic() - began_s) * 1000
        self.offsets = self.sandbox.freeze_output()
        self.books.streams_at(self.offsets)
        self._continued_at_us = self.sandbox.clock_us()
        await machine.switch_over()

    def _stopped_for_us(self) -> int:
        """From the guest's stop until QEMU had completed; its own count where this shim saw only one of the two."""
        if self.stopped_at_us and self._completed_at_us:
            return max(0, self._completed_at_us - self.stopped_at_us)
        return self._downtime_us

    def _note_downtime(self, info: MigrationInfo) -> None:
        if info.status is MigrationStatus.COMPLETED:
            self._downtime_us = info.downtime_ms * 1000

    async def _completed(self) -> None:
        """Everything is out. The record, then the first frame, then the news."""
        await self.session.channel_is_free()
        await self.session.feed(MemoryComplete(self.handover()))
        if self.session.state in (State.CANCELLING, State.CANCELLED):
            self.end_transfer(Outcome.CANCELLED, "the migration was cancelled")
            return
        self.tell_success()

    async def _last_look(self) -> None:
        """QEMU's own sums, for the report; while its process is there, and not in the blackout."""
        machine = self.sandbox.machine
        if self.pacer is None or machine is None or not machine.alive or not self.session.party.complete:
            return
        with contextlib.suppress(SandshiftError, TimeoutError):
            async with asyncio.timeout(LAST_LOOK_S):
                self.pacer.ended(await machine.migration_info(), now_s=self._completed_at_s)

    def tell_success(self) -> None:
        """DONE, and before it whatever nobody was there to tell."""
        for phase in (Phase.SETUP_DONE, Phase.BLACKOUT_STARTED, Phase.OFFLINE_DONE):
            self.session.tell(Told(phase, PhaseState.SUCCESS))
        self.end_transfer(Outcome.SUCCESS, "")

    async def _not_completed(self, machine: Machine) -> None:
        """QEMU gave up, or was told to; unless it lies dying it has resumed the guest by itself."""
        info = await machine.migration_info()
        self.sandbox.thaw_output()
        reason = info.error or f"QEMU reports {info.status.value}"
        if info.status is MigrationStatus.CANCELLED:
            await self.fail(Outcome.CANCELLED, "the migration was cancelled")
        else:
            await self.fail(Outcome.PEER_LOST, f"the transfer failed: {reason}")

    async def _give_up(self, machine: Machine, rule: StopSending) -> None:
        """A rule of ours ended the transfer while the source can still go on; if QEMU was faster, all has gone out well."""
        await machine.cancel_transfer()
        if (info := await self._own_info(machine)).status is MigrationStatus.COMPLETED:
            self._completed_at_s = time.monotonic()
            self._note_downtime(info)
            await self._completed()
            return
        self.sandbox.thaw_output()
        await self.fail(rule.outcome, rule.message)

    @property
    def machine_shape(self) -> MachineShape | None:
        return self._shape

    def report(self) -> Report:
        stamps = SourceStamps(self.stopped_at_us, self._continued_at_us, completed_us=self._completed_at_us)
        checksum = ChecksumReport(took_ms=self.checksum_ms) if self.memory_digest else None
        return report_of(
            self, blackout=None, pieces=split(source=stamps), pacer=self.pacer, checksum=checksum
        )

    def handover(self) -> bytes:
        """The handover record: made once, the same bytes ever after."""
        record = state_pb2.HandoverRecord(
            stopped_at_unix_us=self.stopped_at_us,
            stopped_for_us=self._stopped_for_us(),
            memory_digest=self.memory_digest,
            streams=[
                state_pb2.StreamOffset(process_id=process_id, stream=stream, offset=offset)
                for (process_id, stream), offset in sorted(self.offsets.items())
            ],
        )
        return record.SerializeToString(deterministic=True)

    # What the protocol orders

    async def stop_transfer(self) -> RightEvent | None:
        machine = self.sandbox.machine
        if machine is None or not machine.alive:
            return None
        async with self._sending:  # Else a transfer would begin after this look, and go on.
            before = (await self._info_or_cut(machine)).status
        if before in (MigrationStatus.NONE, MigrationStatus.FAILED, MigrationStatus.CANCELLED):
            return None
        if before is not MigrationStatus.COMPLETED:
            await machine.cancel_transfer()
        self._note_downtime(info := await self._own_info(machine))
        if info.status is MigrationStatus.COMPLETED:
            return None if self.session.party.complete else MemoryComplete(self.handover())
        self.sandbox.thaw_output()
        if self.session.channel is not None:
            self.session.channel.cut()
        return ChannelLost()

    async def _info_or_cut(self, machine: Machine) -> MigrationInfo:
        """`_own_info` for a transfer that is to end; a QEMU that says nothing has its channel cut first.

        QEMU 10.0 with auto-converge hangs as a whole, its guest too, 5 s after its channel has begun to take nothing: a timer
        of its main loop (cpu_throttle_dirty_sync_timer_tick) waits for the lock under which the migration's thread sends.
        It goes on as soon as that thread's sendmsg fails.
        """
        try:
            async with asyncio.timeout(HANGS_S):
                return await self._own_info(machine)
        except (TimeoutError, Unavailable):
            self.cut_unused_channel()
            return await self._own_info(machine)

    async def _own_info(self, machine: Machine) -> MigrationInfo:
        """What QEMU says of this session's transfer.

        It remembers the last one that it had until the next begins: the one by which the guest came here (from another
        host, or from a template), or one that was taken back. None of this session's has begun before Transferring is
        on disk, and one that completed leaves the guest stopped for good.
        """
        info = await machine.migration_info()
        if self.session.state in (State.SOURCE_EXPORTED, State.SOCKET_WAITING, State.SOCKET_READY):
            return replace(info, status=MigrationStatus.NONE)
        if info.status is MigrationStatus.COMPLETED and await machine.run_state() not in SENT_AWAY:
            return replace(info, status=MigrationStatus.NONE)
        return info

    async def guest_runs(self) -> None:
        self.sandbox.parts.haste.end()
        self.sandbox.thaw_output()
        if not self.sandbox.processes.followed:
            self._task_follow = asyncio.create_task(follow_again(self.sandbox), name="follow again")

    async def destroy_vm(self) -> None:
        await self._last_look()
        await self.sandbox.end(EXIT_MIGRATED, moved_to=self.moved_to)

    async def close(self) -> None:
        await self._last_look()
        await super().close()

    async def vm_died(self) -> None:
        """The transfer's task may see it too; what a dead VM means, the protocol says."""
        if self.session.state in BEFORE_COMPLETION:
            await self.fail(*self._why_dead())
            self.cut_unused_channel()
        try:
            await self.session.feed(VmDied("its process has ended"))
        except SandshiftError as error:
            log.error("session %s: %s", self.session.session_id, error)  # noqa: TRY400 - it says all
        moved = self.session.party.cell is Cell.GONE
        await self.sandbox.end(
            EXIT_MIGRATED if moved else EXIT_KILLED, moved_to=self.moved_to if moved else ""
        )

    async def settled(self) -> None:
        if self._task_follow is not None:
            await asyncio.wait([self._task_follow])  # What it could not do is in the log.

    async def rolled_back(self, *, succeeded: bool) -> None:
        """A Finalize(RESUME) or a Cleanup has brought the guest back, or could not."""
        told = phases.recovery(succeeded=succeeded)
        self.session.tell(told)
        if succeeded and self.sandbox.guest is not None:
            try:
                await self.sandbox.guest.set_clock(time.time_ns)
            except SandshiftError as error:
                self.session.warnings.append(f"the guest's clock was not stepped: {error.message}")

    async def look(self) -> Restarted:
        machine = self.sandbox.machine
        if machine is None or not machine.alive:
            return Restarted(vm_alive=False)
        self._note_downtime(info := await self._own_info(machine))
        status = info.status
        running = await machine.run_state() is RunState.RUNNING
        completed = status is MigrationStatus.COMPLETED
        handover = self.handover() if completed and self.session.party.cell is Cell.OPEN else b""
        return Restarted(
            vm_alive=True, vm_running=running, transfer=transfer_state(status), handover=handover
        )


def transfer_state(status: MigrationStatus) -> TransferState:
    """QEMU's word as the protocol knows it."""
    match status:
        case MigrationStatus.NONE | MigrationStatus.CANCELLED:
            return TransferState.NONE
        case MigrationStatus.COMPLETED:
            return TransferState.COMPLETED
        case MigrationStatus.FAILED:
            return TransferState.FAILED
        case _:
            return TransferState.GOING_ON
