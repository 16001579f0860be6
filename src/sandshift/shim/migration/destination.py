"""The destination's side of a session: import, prepare a VM that waits, receive, and afterwards run or discard."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from sandshift.errors import AlreadyThere, SandshiftError
from sandshift.sandbox.patching import patch_bytes, patch_from_bytes
from sandshift.session.blackout import (
    Blackout,
    DestinationSaw,
    DestinationStamps,
    SourceSays,
    clock_skew_us,
    measure,
    skew_warning,
    split,
)
from sandshift.session.phases import Outcome, Phase, PhaseState, Told
from sandshift.session.record import BlackoutExited
from sandshift.session.report import ChecksumReport, Report
from sandshift.session.right_model import (
    ChannelLost,
    MemoryComplete,
    Moved,
    Restarted,
    RightEvent,
    TransferFailed,
    VmDied,
)
from sandshift.session.statement import Cell
from sandshift.session.states import Event, State
from sandshift.shim.migration.books import (
    ADOPTED_NOTE,
    HEARD_NOTE,
    LOADED_NOTE,
    NUMBER,
    PATCH_NOTE,
    STARTING_NOTE,
)
from sandshift.shim.migration.patience import Patience, has_ended, round_trip_us
from sandshift.shim.migration.reporting import report_of
from sandshift.shim.migration.session import MEMORY_DIFFERS
from sandshift.shim.migration.side import POLL_S, EventQueue, SessionSide
from sandshift.shim.migration.source import transfer_state
from sandshift.shim.sandbox import EXIT_KILLED
from sandshift.shim.tasks.disk_matching import match, needs_disks
from sandshift.vmm.machine import ChannelSecurity, MigrationStatus, RunState
from sandshift.wire.sandshift import state_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sandshift.rootfs.plan import DiskFile
    from sandshift.sandbox.model import Container, Sandbox
    from sandshift.sandbox.patching import Patch, Patching
    from sandshift.sandbox.shape import MachineShape
    from sandshift.session.statement import Statement
    from sandshift.vmm.machine import Machine, MachineEvent

log = logging.getLogger(__name__)

HAS_RUN: Final = frozenset(
    (
        RunState.RUNNING,
        RunState.SHUTDOWN,
        RunState.GUEST_PANICKED,
        RunState.INTERNAL_ERROR,
        RunState.IO_ERROR,
        RunState.WATCHDOG,
        RunState.DEBUG,
        RunState.SUSPENDED,
    )
)
"""States that a guest which never ran is never in: one that was started before a crash is not taken for new."""

PEER_WORDS: Final = (
    "reset by peer",
    "broken pipe",
    "end of file",
    "end-of-file",
    "unexpected eof",
    "input/output error",
    "not received",
    "tls handshake failed",
    "non-properly terminated",
)
"""What QEMU says when the stream ended or was nobody's who has the key, and not of what was in it."""
ARRIVED_TRIES_MAX: Final = 5


class Destination(SessionSide):
    patching: Patching
    """The imported sandbox, and what was supplied for its containers here."""
    shape: MachineShape
    exported_at_us = 0
    """The source host's clock when it exported."""
    _digest: bytes | None = None
    _handover: state_pb2.HandoverRecord | None = None
    _resumed_at_us = 0
    _round_trip_us = 0
    _stamps = DestinationStamps()
    _task_resume: asyncio.Task[None] | None = None
    checksum_ms = 0.0
    blackout: Blackout | None = None
    _task_arrived: asyncio.Task[None] | None = None

    @functools.cached_property
    def _described(self) -> asyncio.Event:
        """The handover record is here, whatever else the source said before."""
        return asyncio.Event()

    @property
    def model(self) -> Sandbox:
        """The sandbox as it is called here."""
        return self.patching.patched()

    async def patch(self, patch: Patch) -> int:
        """Take what a Task.Create supplies for a container of the source; durable when it returns, with its saved pid.

        Raises:
            NotFound, AlreadyThere: see `Patching.apply`. IllegalMove: its files are not those of the source. Unavailable: it
            could not be written: repeat.
        """
        patched = self.patching.apply(patch)
        if patched is not self.patching and self.sandbox.containers.has(patch.container_id):
            raise AlreadyThere(
                f"container {patch.container_id} is in sandbox {self.sandbox.sandbox_id} still, from an earlier session: "
                "delete it first"
            )
        container = self._container(patch.source_id)
        files = await self._files_of(container, patch)
        if patched is not self.patching:
            await self.books.note(PATCH_NOTE + patch.source_id, patch_bytes(patch))
            self.patching = patched
        if files:
            self.sandbox.disks.expect(container.guest_id, files)
            await self.sandbox.save()
        return await self.sandbox.containers.expect(container, patch)

    async def _files_of(self, container: Container, patch: Patch) -> Mapping[str, DiskFile]:
        """What of this host the container's disks are, by device id."""
        if not needs_disks(container) and not patch.rootfs:
            return {}
        packed = await self.sandbox.fitter.pack(Path(patch.bundle), patch.rootfs)
        return match(container, self.shape, packed.plan, packed.folder_disks)

    def _container(self, source_id: str) -> Container:
        return next(one for one in self.patching.sandbox.containers if one.container_id == source_id)

    async def find_disks(self) -> None:
        """What a VM that could not be made took with it is found again: the containers' disks."""
        there = {disk.device.id for disk in self.sandbox.disks.all()}
        for patch in self.patching.applied.values():
            container = self._container(patch.source_id)
            if not {*container.layers, *container.mounts} <= there:
                self.sandbox.disks.expect(container.guest_id, await self._files_of(container, patch))

    async def prepare(self) -> None:
        """Make the stopped VM, waiting for the stream."""
        await self.sandbox.prepare_incoming(self.model, self.shape)
        await self.session.feed(Moved(Event.PREPARED))

    # The transfer

    async def _transfer(self, *, anew: bool) -> None:
        machine = self.sandbox.require_machine()
        assert self.session.channel is not None
        events = EventQueue(machine)
        patience = Patience(self.session.channel.descriptor, self.bounds.stall_s)
        try:
            if anew or (status := (await machine.migration_info()).status) is MigrationStatus.NONE:
                security = ChannelSecurity(self.books.session_key if self.books.encrypted else b"")
                with self.session.channel.lent() as channel_fd:
                    await machine.migrate_in(channel_fd, security)
            else:
                await self._on_status(machine, status)
            while not self.session.transfer.done.done():
                event = await events.next(POLL_S)
                if event is None:
                    if why := self._patience_is_over(patience):
                        await self.fail(*why)
                else:
                    await self._on_event(machine, event)
        finally:
            events.close()

    def _patience_is_over(self, patience: Patience) -> tuple[Outcome, str] | None:
        """Before the first byte only the deadline counts, from TransferSandbox on: the source may be called much later."""
        channel, transfer = self.session.channel, self.session.transfer
        if not transfer.started or channel is None or channel.lost:
            return None
        if not transfer.arrived.is_set():
            if has_ended(channel.descriptor):
                # QEMU says nothing of a connection that ends before its TLS session has begun.
                return Outcome.PEER_LOST, "the channel was closed before the first byte came"
            return patience.deadline_is_over(time.monotonic() - self._began_s, self.deadline_s)
        return patience.is_over(time.monotonic(), self.deadline_s)

    async def _on_event(self, machine: Machine, event: MachineEvent) -> None:
        if event.name == "DEAD":
            await self.fail(
                Outcome.OWN_VM_FAILED,
                f"the destination's VM process has died: {event.data.get('stderr', '')}",
            )
        elif event.name == "MIGRATION":
            await self._on_status(machine, MigrationStatus(str(event.data["status"])), at_us=event.at_us)

    async def _on_status(self, machine: Machine, status: MigrationStatus, *, at_us: int = 0) -> None:
        """`at_us`: QEMU's stamp; 0 if it has been so since nobody knows when."""
        match status:
            case MigrationStatus.ACTIVE:
                self.session.transfer.arrived.set()
                await self.mark_started()
            case MigrationStatus.COMPLETED:
                await self._completed(machine, at_us)
            case MigrationStatus.FAILED:
                await self._failed(machine)

    async def _completed(self, machine: Machine, at_us: int) -> None:
        """All of it is here. With checksum verification nothing is said before the digests have been compared."""
        self._stamps = replace(self._stamps, completed_us=at_us)
        self.moment("destination: everything is here")
        self._task_resume = asyncio.create_task(self._watch_resume(machine), name="resume stamp")
        await self.mark_started()
        if self.options.checksum_verification:
            began_s = time.monotonic()
            self._digest = await machine.memory_digest()
            self.checksum_ms = (time.monotonic() - began_s) * 1000
        self._measure_way()
        await self.session.channel_is_free()
        if self.options.checksum_verification and not await self._source_agrees():
            return
        await self.session.feed(MemoryComplete())
        if self.session.state is State.TRANSFER_COMPLETED:
            self.end_transfer(Outcome.SUCCESS, "")
        self.books.note_soon(LOADED_NOTE, NUMBER.pack(at_us))  # The guest need not wait for it.

    async def catch_up(self) -> None:
        """If our VM has everything, wait until that is on record.

        The source answers its caller once this VM has confirmed the end, and the caller may be here with RESUME before this
        shim has handled the VM's own word of it. In turns a Cancel would have to wait for this: call it before.
        """
        machine = self.sandbox.machine
        if machine is None or self.session.state not in (State.SOCKET_READY, State.TRANSFERRING):
            return
        with contextlib.suppress(SandshiftError):  # A VM that does not answer has not everything.
            if (await machine.migration_info()).status is MigrationStatus.COMPLETED:
                await asyncio.shield(self.session.transfer.done)

    def _measure_way(self) -> None:
        if self.session.channel is not None and not self.session.channel.lost:
            self._round_trip_us = round_trip_us(self.session.channel.descriptor)

    async def _source_agrees(self) -> bool:
        try:
            async with asyncio.timeout(self.bounds.handover_frame_s):
                await self._described.wait()
        except TimeoutError:
            await self.fail(Outcome.PEER_LOST, "the source's digest of the guest's memory did not come")
            return False
        if self._handover is None or self._handover.memory_digest != self._digest:
            await self.session.feed(TransferFailed(MEMORY_DIFFERS))
            self.end_transfer(Outcome.CHECKSUM, MEMORY_DIFFERS)
            return False
        return True

    def believes(self, statement: Statement) -> bool:
        """Takes the handover record from the first statement that has one."""
        if statement.handover and self._handover is None:
            try:
                self._handover = state_pb2.HandoverRecord.FromString(statement.handover)
            except DecodeError:
                log.warning("the source's handover record cannot be read")
                return False
            self._described.set()
        if self._digest is None or self._handover is None:
            return True
        return self._handover.memory_digest == self._digest

    def heard(self) -> None:
        self.books.note_soon(HEARD_NOTE, b"1")

    async def _failed(self, machine: Machine) -> None:
        reason = (await machine.migration_info()).error or "QEMU gives no reason"
        lost = any(word in reason.lower() for word in PEER_WORDS)
        await self.fail(
            Outcome.PEER_LOST if lost else Outcome.OWN_VM_FAILED, f"the transfer failed: {reason}"
        )

    # What the protocol orders

    async def stop_transfer(self) -> RightEvent | None:
        machine = self.sandbox.machine
        if self.session.channel is None or self.session.party.complete:
            return None
        if machine is not None and machine.alive:
            status = (await machine.migration_info()).status
            if status is MigrationStatus.COMPLETED:
                return None
        self.session.channel.cut()
        return ChannelLost()

    def about_to_start(self) -> None:
        super().about_to_start()
        self._stamps = replace(self._stamps, starting_us=self.sandbox.clock_us())
        self.books.note_soon(STARTING_NOTE, NUMBER.pack(self._stamps.starting_us))

    def take_notes(self, notes: Mapping[str, bytes]) -> None:
        """What an earlier shim of this session saw and heard."""
        for name, value in notes.items():
            if name.startswith(PATCH_NOTE):
                self.patching = self.patching.apply(patch_from_bytes(value))
        completed, starting = (
            NUMBER.unpack(notes[name])[0] if name in notes else 0 for name in (LOADED_NOTE, STARTING_NOTE)
        )
        self._stamps = replace(self._stamps, completed_us=completed, starting_us=starting)
        if handover := self.session.party.record.peer_handover:
            self._handover = state_pb2.HandoverRecord.FromString(handover)
            self._described.set()

    def ran_before(self) -> None:
        """An earlier shim had started the guest here: do what follows a start, as far as it had not."""
        if self.session.party.cell is not Cell.RUNNING or not self.sandbox.life.vacant:
            return
        self._resumed_at_us = self._stamps.starting_us
        self._follow_the_start()

    async def guest_runs(self) -> None:
        """In the blackout's last moment: only what must not wait."""
        self._follow_the_start()
        self.sandbox.parts.haste.end()

    def _follow_the_start(self) -> None:
        self._stamps = replace(self._stamps, resumed_us=self._resumed_at_us or self.sandbox.clock_us())
        self.blackout = measure(self._source_says(), self._saw())
        told = BlackoutExited(duration_ms=self.blackout.duration_ms, stopped_at_us=self._stamps.resumed_us)
        self.session.tell(Told(Phase.BLACKOUT_EXITED, PhaseState.SUCCESS), blackout=told)
        self.moment("destination: the guest runs")
        if self._task_arrived is None:
            self._task_arrived = asyncio.create_task(self._arrived(), name="arrival")

    def _source_says(self) -> SourceSays:
        said = self._handover
        return SourceSays(said.stopped_at_unix_us, said.stopped_for_us) if said else SourceSays(0, 0)

    def _saw(self) -> DestinationSaw:
        return DestinationSaw(self._stamps.completed_us, self._stamps.resumed_us, self._round_trip_us)

    @property
    def machine_shape(self) -> MachineShape | None:
        return self.shape

    def report(self) -> Report:
        skew_us = clock_skew_us(self._source_says(), self._saw())
        if warning := skew_warning(skew_us):
            self.session.warnings.append(warning)
        checksum = None
        if self._digest is not None:
            checksum = ChecksumReport(took_ms=self.checksum_ms, matched=self.outcome is not Outcome.CHECKSUM)
        return report_of(
            self,
            blackout=self.blackout,
            pieces=split(destination=self._stamps),
            checksum=checksum,
            clock_skew_ms=skew_us / 1000 if skew_us is not None else None,
        )

    async def _watch_resume(self, machine: Machine) -> None:
        """Notes QEMU's own stamp of the guest's start."""
        async for event in machine.events():
            if event.name == "RESUME":
                self._resumed_at_us = event.at_us
                return

    async def _arrived(self) -> None:
        """Clock, processes and streams, as soon as the guest answers. Errors are warnings: the guest runs."""
        try:
            await self._adopt()
        except (SandshiftError, OSError) as error:
            self.session.warnings.append(f"after the move not all output is followed: {error}")
            log.warning("after the move: %s", error)
        await asyncio.sleep(self.sandbox.parts.arrival_pause_s)
        try:
            await self.sandbox.arrived()
        except SandshiftError as error:
            self.session.warnings.append(f"after the move the guest's agent did not answer: {error.message}")
            log.warning("after the move: %s", error)

    async def _adopt(self) -> None:
        """Streams go on where the source says that it stopped; once: a later shim knows better from its own files."""
        offsets = {
            (at.process_id, at.stream): at.offset for at in (self._handover.streams if self._handover else ())
        }
        for process in self.model.processes:
            bases = {stream: at for (name, stream), at in offsets.items() if name == process.process_id}
            self.sandbox.processes.adopt(process.process_id, process.pid, process.args, bases)
        if ADOPTED_NOTE in self.books.state.notes:
            return
        patches = {patch.container_id: patch for patch in self.patching.applied.values()}
        problems = self.sandbox.containers.adopt(self.model.containers, patches, offsets)
        self.session.warnings += [f"after the move: {problem}" for problem in problems]
        await self.sandbox.containers.save()
        await self.books.note(
            ADOPTED_NOTE, b"1"
        )  # Before anything is followed: nothing may be delivered twice.

    async def settled(self) -> None:
        """Returns when what follows a start here has been done."""
        if self._task_arrived is not None:
            await asyncio.wait([self._task_arrived])  # What it could not do is in the log and the report.

    async def let_go(self) -> None:
        """What follows a start here and is not done, the next shim does."""
        if self._task_arrived is not None:
            self._task_arrived.cancel()
            await asyncio.wait([self._task_arrived])
        await super().let_go()

    async def vm_died(self) -> None:
        await self.fail(Outcome.OWN_VM_FAILED, "the destination's VM process has died")
        self.cut_unused_channel()
        self.cut_unused_channel()
        await self.session.feed(VmDied("its process has ended"))
        if self.session.party.cell is Cell.RUNNING:
            await self.sandbox.end(EXIT_KILLED)

    async def rolled_back(self, *, succeeded: bool) -> None:
        """Nothing to tell: a destination that goes back has nothing to recover."""

    async def destroy_vm(self) -> None:
        await self.sandbox.abandon_incoming()

    async def look(self) -> Restarted:
        machine = self.sandbox.machine
        if machine is None or not machine.alive:
            return Restarted(vm_alive=self.session.state is State.DESTINATION_IMPORTED)
        status = (await machine.migration_info()).status
        running = await machine.run_state() in HAS_RUN
        if self.options.checksum_verification and status is MigrationStatus.COMPLETED and not running:
            self._digest = await machine.memory_digest()
        return Restarted(vm_alive=True, vm_running=running, transfer=transfer_state(status))
