"""One QEMU process as a Machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from sandshift.errors import (
    AlreadyThere,
    Damaged,
    IllegalMove,
    NotSupported,
    PeerProtocolError,
    SandshiftError,
    TimedOut,
    Unavailable,
)
from sandshift.sandbox.shape import Device, MachineShape
from sandshift.vmm import command, psk, transfer
from sandshift.vmm.channel import Channel
from sandshift.vmm.digest import memory_digest_of_process
from sandshift.vmm.events import EventFanout, EventStream
from sandshift.vmm.machine import (
    ChannelSecurity,
    DiskSource,
    MachineEvent,
    MachineSpec,
    MigrationInfo,
    MigrationStatus,
    RunState,
    TransferSettings,
)
from sandshift.vmm.process import PID_FILE, STDERR_FILE, VmProcess, trim_log
from sandshift.vmm.qmp import Qmp, QmpRefused
from sandshift.vmm.standard import with_disk, without_disk

QMP_SOCKET: Final = "qmp"
AGENT_SOCKET: Final = "agent"
KEYS_FOLDER: Final = "keys"

CHANNEL_NAME: Final = "channel"
"""Of the descriptor that a transfer uses up."""
KEPT_CHANNEL_NAME: Final = "kept-channel"
"""Of the one that outlives the shim."""
TEMPLATE_NAME: Final = "template"

CANCEL_S: Final = 10.0
HANDSHAKE_LOOK_S: Final = 0.25
TEMPLATE_S: Final = 120.0
"""For writing or reading a whole guest: a slow disk and 8 GiB."""
LAST_WORDS_S: Final = 1.0
"""How long a dead QEMU's unread events are waited for."""
RESUME_TRIES_MAX: Final = 200
RESUME_WAIT_S: Final = 0.01
TOTALS_TRIES_MAX: Final = 5
TOTALS_WAIT_S: Final = 0.002
"""QEMU announces `completed` a moment before it fills in the totals."""
LOG_LOOK_S: Final = 5.0
LOG_BYTES_MAX: Final = 1 << 20
UNPLUG_S: Final = 10.0
UNIX_PATH_MAX: Final = 107

_STATES: Final[Mapping[str, RunState]] = {
    **{state.value: state for state in RunState if state is not RunState.DEAD},
    "restore-vm": RunState.INMIGRATE,
    "save-vm": RunState.PAUSED,
    "io-error": RunState.PAUSED,
    "watchdog": RunState.PAUSED,
    "debug": RunState.PAUSED,
    "suspended": RunState.PAUSED,
}


class QemuMachine:
    """See `sandshift.vmm.machine.Machine`. Made by QemuVmm through `open`."""

    def __init__(self, spec: MachineSpec, process: VmProcess, *, incoming: bool) -> None:
        self._spec = spec
        self._process = process
        self._fanout = EventFanout()
        self._qmp: Qmp | None = None
        self._incoming = incoming
        """A guest is expected or coming in: `cont` would be taken as a wish for later."""
        self._may_send = False
        """A transfer out was begun, by us or perhaps by an earlier shim. Else `cont` needs no question before it."""
        self._detached = False
        self._channel: Channel | None = None
        """Held while a transfer goes on, to end it for the peer too if our VM process fails."""
        self._receiving = MigrationStatus.NONE
        """The last that QEMU said of a transfer in."""
        self._task_handshake: asyncio.Task[None] | None = None
        self._never_began = False
        """A transfer in ended before QEMU took it up, of which QEMU says nothing."""
        self._credentials_made = 0
        self._folder_fd = os.open(spec.run_dir, os.O_PATH | os.O_DIRECTORY)
        # Tells everybody of the end of the process. Its exceptions are all handled inside.
        self._task_end = asyncio.create_task(self._watch_end(), name=f"vm end {spec.name}")
        # Ends with us. Nobody needs to know how it fares.
        self._task_tidy = asyncio.create_task(self._keep_logs_small(), name=f"vm logs {spec.name}")

    @classmethod
    async def open(
        cls, spec: MachineSpec, process: VmProcess, *, incoming: bool, greeting_s: float, command_s: float
    ) -> QemuMachine:
        """Connect to a QEMU that has just been started or found.

        Raises:
            Unavailable: it does not greet us. The process is left as it is.
        """
        machine = cls(spec, process, incoming=incoming)
        try:
            machine._qmp = await Qmp.connect(
                spec.run_dir / QMP_SOCKET,
                spec.name,
                machine._on_event,
                timeout_s=greeting_s,
                command_s=command_s,
            )
        except BaseException:
            await machine._release()
            raise
        return machine

    @property
    def shape(self) -> MachineShape:
        return self._spec.shape

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.alive

    @property
    def qemu_version(self) -> tuple[int, int, int]:
        """Of the process that runs, which may be older than what is installed."""
        return self._connection.version

    @property
    def agent_socket(self) -> Path:
        path = self._spec.run_dir / AGENT_SOCKET
        if len(os.fsencode(path)) <= UNIX_PATH_MAX:
            return path
        return Path(f"/proc/self/fd/{self._folder_fd}/{AGENT_SOCKET}")

    def events(self) -> EventStream:
        return self._fanout.subscribe()

    async def run_state(self) -> RunState:
        try:
            answer = await self._connection.execute("query-status")
        except Unavailable:
            if not self.alive:
                return RunState.DEAD
            raise
        status = str(answer.get("status")) if isinstance(answer, Mapping) else ""
        return _STATES.get(status, RunState.INTERNAL_ERROR)

    async def run_vcpus(self, licence: object) -> None:
        del (
            licence
        )  # Whether the guest may run was decided by whoever holds it; to ask for it keeps callers honest.
        if self._incoming and await self.run_state() is RunState.INMIGRATE:
            raise IllegalMove(f"sandbox {self._spec.name}: its memory has not arrived, so it cannot start")
        if self._may_send and await self._being_sent():
            raise IllegalMove(
                f"sandbox {self._spec.name}: it is being sent away; cancel the transfer before it starts"
            )
        listener = self.events()
        try:
            await self._do("start the virtual CPUs", "cont")
            # RESUME precedes the reply to `cont`; without it, ask.
            if not _heard(listener, "RESUME") and (state := await self.run_state()) is not RunState.RUNNING:
                raise IllegalMove(f"sandbox {self._spec.name}: QEMU did not start it, it is {state.value}")
        finally:
            listener.close()

    async def stop_vcpus(self) -> None:
        await self._do("stop the virtual CPUs", "stop")

    async def destroy(self) -> None:
        await self._process.kill()
        if self._detached:
            return  # Another shim's by now.
        await self._task_end
        await self._let_go()
        psk.remove_keys(self._keys_folder)
        for name in (PID_FILE, QMP_SOCKET, AGENT_SOCKET):
            (self._spec.run_dir / name).unlink(missing_ok=True)

    async def detach(self) -> None:
        await self._release()
        self._process.detach()

    async def migrate_out(
        self, channel_fd: int, security: ChannelSecurity, settings: TransferSettings
    ) -> None:
        values = transfer.parameters(settings)
        self._may_send = True
        try:
            await self._arm(transfer.capabilities_out(settings), values, security, sending=True)
            await self._give_channel(channel_fd)
            await self._do("send the guest", "migrate", {"uri": f"fd:{CHANNEL_NAME}"})
        except BaseException:
            await self._forget_channel()
            raise
        finally:
            psk.remove_keys(self._keys_folder)  # The sending side read it when the credentials were made.

    async def migrate_in(self, channel_fd: int, security: ChannelSecurity) -> None:
        try:
            await self._arm(transfer.capabilities_in(), {}, security, sending=False)
            await self._give_channel(channel_fd)
            await self._do("receive a guest", "migrate-incoming", self._from_channel(CHANNEL_NAME))
            # Ends with the handshake, or with us. Its exceptions are all handled inside.
            self._task_handshake = asyncio.create_task(
                self._watch_handshake(), name=f"vm tls {self._spec.name}"
            )
        except BaseException:
            await self._forget_channel()
            psk.remove_keys(self._keys_folder)
            raise

    async def switch_over(self) -> None:
        await self._do("switch over", "migrate-continue", {"state": MigrationStatus.PRE_SWITCHOVER.value})

    async def cancel_transfer(self) -> None:
        if self._incoming:
            return
        listener = self.events()
        try:
            if not transfer.is_under_way((await self.migration_info()).status):
                return
            await self._do("cancel the transfer", "migrate_cancel")
            await self._transfer_ended(listener, CANCEL_S, "be cancelled")
        finally:
            listener.close()

    async def tune(self, settings: TransferSettings) -> None:
        await self._do(
            "change the transfer's settings", "migrate-set-parameters", transfer.parameters(settings)
        )

    async def migration_info(self) -> MigrationInfo:
        for _ in range(TOTALS_TRIES_MAX):
            answer = await self._connection.execute("query-migrate")
            info = transfer.migration_info(answer)
            unfilled = isinstance(answer, Mapping) and answer.get("total-time") == 0
            if not (info.status is MigrationStatus.COMPLETED and unfilled):
                break
            await asyncio.sleep(TOTALS_WAIT_S)
        if self._never_began and info.status in (MigrationStatus.NONE, MigrationStatus.SETUP):
            info = replace(info, status=MigrationStatus.FAILED)
        return self._with_reason(info)

    async def keep_channel(self, channel_fd: int) -> None:
        try:
            await self._connection.pass_fd(KEPT_CHANNEL_NAME, channel_fd)
        except QmpRefused as error:
            raise IllegalMove(
                f"sandbox {self._spec.name}: QEMU refused the channel: {error.reason}"
            ) from error

    @property
    def channel_keeper_pid(self) -> int:
        return self.pid

    async def drop_channel(self) -> None:
        await self._close_fd(KEPT_CHANNEL_NAME)

    async def attach_disk(self, device: Device, source: DiskSource) -> None:
        if any(device.id == other.id for other in self.shape.devices):
            raise AlreadyThere(f"sandbox {self._spec.name}: it has a device {device.id} already")
        options = command.disk_options(device)
        await self._do(f"open disk {device.id}", "blockdev-add", command.drive(device, source.path))
        try:
            await self._do(f"plug in disk {device.id}", "device_add", options)
        except BaseException:
            with contextlib.suppress(SandshiftError):
                await self._connection.execute("blockdev-del", {"node-name": command.node_name(device.id)})
            raise
        self._spec = with_disk(self._spec, device, source)

    async def detach_disk(self, device_id: str) -> None:
        if not any(device_id == device.id for device in self.shape.devices):
            return
        listener = self.events()
        try:
            await self._do(f"take out disk {device_id}", "device_del", {"id": device_id})
            await self._deleted(listener, device_id)
        finally:
            listener.close()
        self._spec = without_disk(self._spec, device_id)
        await self._do(f"close disk {device_id}", "blockdev-del", {"node-name": command.node_name(device_id)})

    async def memory_digest(self) -> bytes:
        if not self.shape.shared_memory:
            raise NotSupported(
                f"sandbox {self._spec.name}: its memory is not shared (vm.shared_memory), so cannot be hashed"
            )
        if (state := await self.run_state()) is RunState.RUNNING:
            raise IllegalMove(
                f"sandbox {self._spec.name}: it is {state.value}, and memory is hashed of stopped guests only"
            )
        return await asyncio.to_thread(memory_digest_of_process, self.pid, self.shape.memory_bytes)

    async def save(self, path: Path) -> None:
        await self.stop_vcpus()
        listener = self.events()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await self._arm(
                transfer.capabilities_file(),
                {"max-bandwidth": transfer.UNLIMITED_BYTES_PER_S},
                ChannelSecurity(),
                sending=True,
            )
            await self._connection.pass_fd(TEMPLATE_NAME, fd)
            await self._do("save the guest", "migrate", {"uri": f"fd:{TEMPLATE_NAME}"})
            await self._expect_completed(listener, f"be saved to {path}")
            await asyncio.to_thread(os.fsync, fd)
        except BaseException:
            _remove(path)
            raise
        finally:
            os.close(fd)
            listener.close()

    async def load(self, template: Path) -> None:
        """Take the guest in that `save` wrote. For QemuVmm.start_from_template; the VM waits for one.

        Raises:
            Damaged: QEMU cannot read it as a guest of this shape.
        """
        listener = self.events()
        fd = os.open(template, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await self._arm(transfer.capabilities_file(), {}, ChannelSecurity(), sending=False)
            await self._connection.pass_fd(TEMPLATE_NAME, fd)
            await self._do("load the template", "migrate-incoming", self._from_channel(TEMPLATE_NAME))
            await self._expect_completed(listener, f"be loaded from {template}")
        finally:
            os.close(fd)
            listener.close()

    async def find_out(self) -> None:
        """For QemuVmm.reattach: what an earlier shim had begun."""
        self._incoming = await self.run_state() is RunState.INMIGRATE
        self._may_send = not self._incoming

    @property
    def _connection(self) -> Qmp:
        assert self._qmp is not None, "open() returns only connected machines"
        return self._qmp

    @property
    def _keys_folder(self) -> Path:
        return self._spec.run_dir / KEYS_FOLDER

    async def _do(self, doing: str, command: str, arguments: Mapping[str, object] | None = None) -> None:
        """Run a command whose refusal means: not in this state."""
        try:
            await self._connection.execute(command, arguments)
        except QmpRefused as error:
            raise IllegalMove(
                f"sandbox {self._spec.name}: QEMU refused to {doing}: {error.reason}"
            ) from error

    async def _being_sent(self) -> bool:
        """Whether a transfer out that is not over has stopped the guest."""
        for _ in range(RESUME_TRIES_MAX):
            if await self.run_state() is not RunState.FINISH_MIGRATE:
                return False
            if transfer.is_under_way((await self.migration_info()).status):
                return True
            await asyncio.sleep(
                RESUME_WAIT_S
            )  # It failed; QEMU says so a moment before it resumes the guest.
        return True

    async def _arm(
        self,
        capabilities: list[transfer.Json],
        values: transfer.Json,
        security: ChannelSecurity,
        *,
        sending: bool,
    ) -> None:
        credentials = await self._make_credentials(security, sending=sending)
        await self._do("arm a transfer", "migrate-set-capabilities", {"capabilities": capabilities})
        await self._do("arm a transfer", "migrate-set-parameters", {**values, "tls-creds": credentials})

    async def _make_credentials(self, security: ChannelSecurity, *, sending: bool) -> str:
        """The id of a credentials object for this key; empty without a key. Each transfer has its own."""
        if not security.psk:
            return ""
        self._credentials_made += 1
        object_id = f"psk-{time.monotonic_ns()}-{self._credentials_made}"  # An earlier shim made some too.
        psk.write_keys(self._keys_folder, security.psk)
        await self._do(
            "take the channel's key",
            "object-add",
            psk.credentials(object_id, self._keys_folder, sending=sending),
        )
        return object_id

    async def _give_channel(self, channel_fd: int) -> None:
        self._end_channel(whole=True)
        self._channel = Channel(channel_fd)
        try:
            await self._connection.pass_fd(CHANNEL_NAME, channel_fd)
            self._channel.never_block()
        except QmpRefused as error:
            raise IllegalMove(
                f"sandbox {self._spec.name}: QEMU refused the channel: {error.reason}"
            ) from error

    def _end_channel(self, *, whole: bool) -> None:
        """Our hold on the channel ends; unless `whole`, so does the channel."""
        if self._channel is not None:
            if not whole:
                self._channel.shut_down()
            self._channel.close()
            self._channel = None

    async def _forget_channel(self) -> None:
        self._end_channel(whole=True)
        with contextlib.suppress(SandshiftError):
            await self._close_fd(CHANNEL_NAME)

    async def _close_fd(self, name: str) -> None:
        # Refused means that there is none of that name, which is what we want.
        with contextlib.suppress(QmpRefused):
            await self._connection.execute("closefd", {"fdname": name})

    def _from_channel(self, name: str) -> dict[str, object]:
        arguments: dict[str, object] = {"uri": f"fd:{name}"}
        if self.qemu_version >= (9, 1, 0):
            # Stay alive after a failure, so that its reason can be asked for.
            arguments["exit-on-error"] = False
        return arguments

    async def _expect_completed(self, listener: EventStream, what: str) -> None:
        await self._transfer_ended(listener, TEMPLATE_S, what)
        info = await self.migration_info()
        if info.status is not MigrationStatus.COMPLETED:
            raise Damaged(f"sandbox {self._spec.name} could not {what}: {info.error or info.status.value}")

    async def _transfer_ended(self, listener: EventStream, timeout_s: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                async for event in listener:
                    if event.name == "MIGRATION" and transfer.has_ended(_status_of(event)):
                        return
        except TimeoutError as error:
            raise TimedOut(
                f"sandbox {self._spec.name}: a transfer did not {what} within {timeout_s:g} s"
            ) from error
        raise Unavailable(f"sandbox {self._spec.name}: QEMU ended before a transfer could {what}")

    async def _deleted(self, listener: EventStream, device_id: str) -> None:
        try:
            async with asyncio.timeout(UNPLUG_S):
                async for event in listener:
                    if event.name == "DEVICE_DELETED" and event.data.get("device") == device_id:
                        return
        except TimeoutError as error:
            raise TimedOut(
                f"sandbox {self._spec.name}: the guest did not let go of {device_id} within {UNPLUG_S:g} s"
            ) from error
        raise Unavailable(f"sandbox {self._spec.name}: QEMU ended before disk {device_id} was out")

    def _with_reason(self, info: MigrationInfo) -> MigrationInfo:
        """A receiving QEMU says why on its standard error only."""
        if not (self._incoming and info.status is MigrationStatus.FAILED):
            return info
        return transfer.with_error(info, self._process.stderr_tail())

    def _on_event(self, event: MachineEvent) -> None:
        if event.name == "MIGRATION":
            self._on_migration(_status_of(event))
        self._fanout.emit(event)

    def _on_migration(self, status: MigrationStatus) -> None:
        if self._incoming:
            self._receiving = status
        if self._incoming and status is not MigrationStatus.SETUP:
            psk.remove_keys(self._keys_folder)  # The handshake is over.
        if transfer.has_ended(status):
            self._end_channel(whole=status is MigrationStatus.COMPLETED)
        if status is MigrationStatus.COMPLETED:
            self._incoming = False

    async def _watch_handshake(self) -> None:
        """A receiving QEMU whose handshake failed prints that and closes the socket; its status stays `setup`."""
        while self._channel is not None and self._receiving in (MigrationStatus.NONE, MigrationStatus.SETUP):
            await asyncio.sleep(HANDSHAKE_LOOK_S)
            if self._channel is None or self._channel.held_by(self.pid):
                continue
            with contextlib.suppress(SandshiftError):
                if (await self.migration_info()).status is MigrationStatus.SETUP:
                    self._never_began = True
                    failed = {"status": MigrationStatus.FAILED.value}
                    self._on_event(MachineEvent("MIGRATION", failed, time.time_ns() // 1000))

    async def _keep_logs_small(self) -> None:
        while True:
            await asyncio.sleep(LOG_LOOK_S)
            for name in (command.CONSOLE_FILE, STDERR_FILE):
                trim_log(self._spec.run_dir / name, LOG_BYTES_MAX)

    async def _watch_end(self) -> None:
        await self._process.ended.wait()
        if self._qmp is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await self._qmp.ended.wait()
        self._end_channel(whole=False)
        data = {"returncode": self._process.returncode, "stderr": self._process.stderr_tail()}
        self._fanout.finish(MachineEvent(name="DEAD", data=data, at_us=time.time_ns() // 1000))

    async def _release(self) -> None:
        """Drop all that we hold but the process itself."""
        self._detached = True
        self._task_end.cancel()
        await asyncio.wait([self._task_end])
        await self._let_go()
        self._fanout.end()

    async def _let_go(self) -> None:
        self._task_tidy.cancel()
        if self._task_handshake is not None:
            self._task_handshake.cancel()
        self._end_channel(whole=True)
        if self._qmp is not None:
            await self._qmp.close()
        if self._folder_fd >= 0:
            os.close(self._folder_fd)
            self._folder_fd = -1


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _status_of(event: MachineEvent) -> MigrationStatus:
    try:
        return transfer.migration_status(str(event.data.get("status", "none")))
    except PeerProtocolError:
        return MigrationStatus.NONE  # Not one that anybody here acts on; whoever asks QEMU is told.


def _heard(listener: EventStream, name: str) -> bool:
    return any(event.name == name for event in listener.take_pending())
