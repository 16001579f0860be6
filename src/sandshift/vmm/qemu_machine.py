"""One QEMU process as a Machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Final

from sandshift.errors import (
    AlreadyThere,
    IllegalMove,
    NotSupported,
    SandshiftError,
    TimedOut,
    Unavailable,
)
from sandshift.sandbox.shape import Device, MachineShape
from sandshift.session.right_licence import demand
from sandshift.vmm import command
from sandshift.vmm.control import Control
from sandshift.vmm.digest import memory_digest_of_process
from sandshift.vmm.events import EventFanout, EventStream
from sandshift.vmm.machine import (
    ChannelSecurity,
    DiskSource,
    MachineEvent,
    MachineSpec,
    MigrationInfo,
    RunState,
    TransferSettings,
)
from sandshift.vmm.process import PID_FILE, STDERR_FILE, VmProcess, trim_log
from sandshift.vmm.qemu_transfer import Transfers, status_of
from sandshift.vmm.qmp import Qmp
from sandshift.vmm.standard import with_disk, without_disk

QMP_SOCKET: Final = "qmp"
AGENT_SOCKET: Final = "agent"
KEPT_CHANNEL_NAME: Final = "kept-channel"
"""Of the descriptor that outlives the shim."""

LAST_WORDS_S: Final = 1.0
"""How long a dead QEMU's unread events are waited for."""
LOG_LOOK_S: Final = 5.0
LOG_BYTES_MAX: Final = 1 << 20
UNPLUG_S: Final = 10.0
UNIX_PATH_MAX: Final = 107


class QemuMachine:
    """See `sandshift.vmm.machine.Machine`. Made by QemuVmm through `open`."""

    def __init__(self, spec: MachineSpec, process: VmProcess, qmp: Qmp) -> None:
        self._spec = spec
        self._process = process
        self._qmp = qmp
        self._fanout = EventFanout()
        self._control = Control(spec.name, qmp, lambda: process.alive)
        self._transfers = Transfers(
            self._control, process, subscribe=self._fanout.subscribe, tell=self._on_event
        )
        qmp.listen(self._on_event)
        self._detached = False
        self._folder_fd = os.open(spec.run_dir, os.O_PATH | os.O_DIRECTORY)
        # Tells everybody of the end of the process. Its exceptions are all handled inside.
        self._task_end = asyncio.create_task(self._watch_end(), name=f"vm end {spec.name}")
        # Ends with us. Nobody needs to know how it fares.
        self._task_tidy = asyncio.create_task(self._keep_logs_small(), name=f"vm logs {spec.name}")

    @classmethod
    async def open(
        cls, spec: MachineSpec, process: VmProcess, *, greeting_s: float, command_s: float
    ) -> QemuMachine:
        """Connect to a QEMU that has just been started or found, and ask what it is about.

        Raises:
            Unavailable: it does not greet us or hangs. The process is left as it is.
        """
        path = spec.run_dir / QMP_SOCKET
        machine = cls(
            spec, process, await Qmp.connect(path, spec.name, timeout_s=greeting_s, command_s=command_s)
        )
        try:
            await machine._transfers.find_out()
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
        return self._control.version

    @property
    def agent_socket(self) -> Path:
        path = self._spec.run_dir / AGENT_SOCKET
        if len(os.fsencode(path)) <= UNIX_PATH_MAX:
            return path
        return Path(f"/proc/self/fd/{self._folder_fd}/{AGENT_SOCKET}")

    def events(self) -> EventStream:
        return self._fanout.subscribe()

    async def run_state(self) -> RunState:
        return await self._control.run_state()

    async def run_vcpus(self, licence: object) -> None:
        demand(licence)
        name = self._spec.name
        if self._transfers.incoming and await self.run_state() is RunState.INMIGRATE:
            raise IllegalMove(f"sandbox {name}: its memory has not arrived, so it cannot start")
        if await self._transfers.being_sent():
            raise IllegalMove(f"sandbox {name}: it is being sent away; cancel the transfer before it starts")
        listener = self.events()
        try:
            await self._control.do("start the virtual CPUs", "cont")
            # RESUME precedes the reply to `cont`; without it, ask.
            if not _heard(listener, "RESUME") and (state := await self.run_state()) is not RunState.RUNNING:
                raise IllegalMove(f"sandbox {name}: QEMU did not start it, it is {state.value}")
        finally:
            listener.close()

    async def stop_vcpus(self) -> None:
        await self._control.do("stop the virtual CPUs", "stop")

    async def destroy(self) -> None:
        await self._process.kill()
        if self._detached:
            return  # Another shim's by now.
        await self._task_end
        await self._let_go()
        self._transfers.remove_keys()
        for name in (PID_FILE, QMP_SOCKET, AGENT_SOCKET):
            (self._spec.run_dir / name).unlink(missing_ok=True)

    async def detach(self) -> None:
        await self._release()
        self._process.detach()

    async def migrate_out(
        self, channel_fd: int, security: ChannelSecurity, settings: TransferSettings
    ) -> None:
        await self._transfers.send(channel_fd, security, settings)

    async def migrate_in(self, channel_fd: int, security: ChannelSecurity) -> None:
        await self._transfers.receive(channel_fd, security)

    async def switch_over(self) -> None:
        await self._transfers.switch_over()

    async def cancel_transfer(self) -> None:
        await self._transfers.cancel()

    async def tune(self, settings: TransferSettings) -> None:
        await self._transfers.tune(settings)

    async def migration_info(self) -> MigrationInfo:
        return await self._transfers.info()

    async def save(self, path: Path) -> None:
        await self.stop_vcpus()
        await self._transfers.save(path)

    async def load(self, template: Path) -> None:
        """Take the guest in that `save` wrote. For QemuVmm.start_from_template; the VM waits for one.

        Raises:
            Damaged: QEMU cannot read it as a guest of this shape.
        """
        await self._transfers.load(template)

    async def keep_channel(self, channel_fd: int) -> None:
        await self._control.give_fd(KEPT_CHANNEL_NAME, channel_fd)

    @property
    def channel_keeper_pid(self) -> int:
        return self.pid

    async def drop_channel(self) -> None:
        await self._control.close_fd(KEPT_CHANNEL_NAME)

    async def attach_disk(self, device: Device, source: DiskSource) -> None:
        if any(device.id == other.id for other in self.shape.devices):
            raise AlreadyThere(f"sandbox {self._spec.name}: it has a device {device.id} already")
        options = command.disk_options(device)
        node = {"node-name": command.node_name(device.id)}
        await self._control.do(f"open disk {device.id}", "blockdev-add", command.drive(device, source.path))
        try:
            await self._control.do(f"plug in disk {device.id}", "device_add", options)
        except BaseException:
            with contextlib.suppress(SandshiftError):
                await self._control.do(f"close disk {device.id}", "blockdev-del", node)
            raise
        self._spec = with_disk(self._spec, device, source)

    async def detach_disk(self, device_id: str) -> None:
        if not any(device_id == device.id for device in self.shape.devices):
            return
        listener = self.events()
        try:
            # A shim that was killed may have left one that is half in or half out.
            if await self._control.do_if_there(f"take out disk {device_id}", "device_del", {"id": device_id}):
                await self._deleted(listener, device_id)
        finally:
            listener.close()
        self._spec = without_disk(self._spec, device_id)
        node = {"node-name": command.node_name(device_id)}
        await self._control.do_if_there(f"close disk {device_id}", "blockdev-del", node)

    async def memory_digest(self) -> bytes:
        name = self._spec.name
        if not self.shape.shared_memory:
            raise NotSupported(
                f"sandbox {name}: its memory is not shared (vm.shared_memory), so cannot be hashed"
            )
        if await self.run_state() is RunState.RUNNING:
            raise IllegalMove(f"sandbox {name}: it is running, and memory is hashed of stopped guests only")
        return await asyncio.to_thread(memory_digest_of_process, self.pid, self.shape.memory_bytes)

    async def _deleted(self, listener: EventStream, device_id: str) -> None:
        name = self._spec.name
        try:
            async with asyncio.timeout(UNPLUG_S):
                async for event in listener:
                    if event.name == "DEVICE_DELETED" and event.data.get("device") == device_id:
                        return
        except TimeoutError as error:
            raise TimedOut(
                f"sandbox {name}: the guest did not let go of {device_id} within {UNPLUG_S:g} s"
            ) from error
        raise Unavailable(f"sandbox {name}: QEMU ended before disk {device_id} was out")

    def _on_event(self, event: MachineEvent) -> None:
        if event.name == "MIGRATION":
            self._transfers.on_migration(status_of(event))
        self._fanout.emit(event)

    async def _keep_logs_small(self) -> None:
        while True:
            await asyncio.sleep(LOG_LOOK_S)
            for name in (command.CONSOLE_FILE, STDERR_FILE):
                trim_log(self._spec.run_dir / name, LOG_BYTES_MAX)

    async def _watch_end(self) -> None:
        await self._process.ended.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._qmp.ended.wait()
        self._transfers.end_channel(whole=False)
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
        self._transfers.let_go()
        await self._qmp.close()
        if self._folder_fd >= 0:
            os.close(self._folder_fd)
            self._folder_fd = -1


def _heard(listener: EventStream, name: str) -> bool:
    return any(event.name == name for event in listener.take_pending())
