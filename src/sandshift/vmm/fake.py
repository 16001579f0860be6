"""Fake VMs for simulations and for the mutants of the conformance suite: in this process, in the loop's time.

They pass tests/vmm/machine_suite.py as QEMU does. A FakeWorld outlives every FakeVmm, as VM processes outlive shims.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from sandshift.errors import AlreadyThere, Damaged, IllegalMove, NotSupported, Unavailable
from sandshift.sandbox.shape import Device, MachineShape
from sandshift.session.right_licence import demand
from sandshift.vmm import transfer
from sandshift.vmm.events import EventStream
from sandshift.vmm.fake_process import AgentProgram, FakeProcess, Faults, RunLog
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
from sandshift.vmm.standard import with_disk, without_disk

PIDS_FIRST: Final = 100_000
AGENT_SOCKET: Final = "agent"


class FakeWorld:
    """All fake VM processes of a simulation, whoever started them, and the log of who ran."""

    def __init__(self) -> None:
        self.log = RunLog()
        self.processes: dict[Path, FakeProcess] = {}
        """By run directory: the living, and the dead until another takes their place."""
        self.clock_ahead_us = 0
        """How far the wall clock of this world's host is ahead of the loop's time."""
        self._pids = PIDS_FIRST

    def next_pid(self) -> int:
        self._pids += 1
        return self._pids


class FakeMachine:
    """See `sandshift.vmm.machine.Machine`. One shim's hold on a FakeProcess."""

    def __init__(self, process: FakeProcess) -> None:
        self.process = process
        self._streams: list[EventStream] = []
        self._detached = False

    @property
    def faults(self) -> Faults:
        return self.process.faults

    @property
    def shape(self) -> MachineShape:
        return self.process.spec.shape

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.alive and not self._detached

    @property
    def agent_socket(self) -> Path:
        return self.process.spec.run_dir / AGENT_SOCKET

    def events(self) -> AsyncIterator[MachineEvent]:
        stream = self.process.fanout.subscribe()
        self._streams.append(stream)
        if self._detached:
            stream.close()
        return stream

    async def run_state(self) -> RunState:
        if not self.process.alive:
            return RunState.DEAD
        await self._answer("query-status")
        return self.process.state

    async def run_vcpus(self, licence: object) -> None:
        demand(licence)
        await self._answer("cont")
        if self.process.state is RunState.INMIGRATE:
            raise IllegalMove(f"sandbox {self._name}: its memory has not arrived, so it cannot start")
        if self.process.state is RunState.FINISH_MIGRATE:
            raise IllegalMove(
                f"sandbox {self._name}: it is being sent away; cancel the transfer before it starts"
            )
        if self.faults.refuse_start:
            raise IllegalMove(f"sandbox {self._name}: QEMU refused to start: {self.faults.refuse_start}")
        self.process.start()

    async def stop_vcpus(self) -> None:
        await self._answer("stop")
        self.process.stop()

    async def destroy(self) -> None:
        self.process.die()
        await asyncio.sleep(0)

    async def detach(self) -> None:
        self._detached = True
        for stream in self._streams:
            stream.close()
        self._streams.clear()

    async def migrate_out(
        self, channel_fd: int, security: ChannelSecurity, settings: TransferSettings
    ) -> None:
        transfer.parameters(settings)
        await self._answer("migrate")
        self._refuse_while_under_way()
        if self.faults.refuse_out:
            raise IllegalMove(
                f"sandbox {self._name}: QEMU refused to send the guest: {self.faults.refuse_out}"
            )
        self.process.begin_out(channel_fd, security, settings)

    async def migrate_in(self, channel_fd: int, security: ChannelSecurity) -> None:
        await self._answer("migrate-incoming")
        self._refuse_while_under_way()
        if self.process.state is not RunState.INMIGRATE:
            raise IllegalMove(
                f"sandbox {self._name}: QEMU refused to receive a guest: it does not wait for one"
            )
        self.process.begin_in(channel_fd, security)

    async def switch_over(self) -> None:
        await self._answer("migrate-continue")
        if self.process.transfer_status is not MigrationStatus.PRE_SWITCHOVER:
            raise IllegalMove(f"sandbox {self._name}: QEMU refused to switch over: not in pre-switchover")
        self.process.go_on()

    async def cancel_transfer(self) -> None:
        await self._answer("migrate_cancel")
        await self.process.cancel()

    async def tune(self, settings: TransferSettings) -> None:
        transfer.parameters(settings)
        await self._answer("migrate-set-parameters")
        self.process.tune(settings)

    async def migration_info(self) -> MigrationInfo:
        await self._answer("query-migrate")
        return self.process.info()

    async def keep_channel(self, channel_fd: int) -> None:
        await self._answer("getfd")
        self.process.keep_channel(channel_fd)

    @property
    def channel_keeper_pid(self) -> int:
        return os.getpid()

    async def drop_channel(self) -> None:
        await self._answer("closefd")
        self.process.drop_channel()

    async def attach_disk(self, device: Device, source: DiskSource) -> None:
        await self._answer("device_add")
        if any(device.id == other.id for other in self.shape.devices):
            raise AlreadyThere(f"sandbox {self._name}: it has a device {device.id} already")
        self._refuse_while_under_way()
        self.process.spec = with_disk(self.process.spec, device, source)

    async def detach_disk(self, device_id: str) -> None:
        await self._answer("device_del")
        if any(device_id == device.id for device in self.shape.devices):
            self._refuse_while_under_way()
            self.process.spec = without_disk(self.process.spec, device_id)

    async def memory_digest(self) -> bytes:
        if not self.shape.shared_memory:
            raise NotSupported(
                f"sandbox {self._name}: its memory is not shared (vm.shared_memory), so cannot be hashed"
            )
        if await self.run_state() is RunState.RUNNING:
            raise IllegalMove(
                f"sandbox {self._name}: it is running, and memory is hashed of stopped guests only"
            )
        return self.process.look().digest()

    async def save(self, path: Path) -> None:
        await self._answer("migrate")
        self.process.stop()
        guest = self.process.look()
        document = {"memory": self.shape.memory_bytes, "state": guest.state(), "pages": guest.packed_text()}
        await asyncio.to_thread(_write_new, path, json.dumps(document))
        self.process.state = RunState.POSTMIGRATE

    @property
    def _name(self) -> str:
        return self.process.spec.name

    def _refuse_while_under_way(self) -> None:
        if transfer.is_under_way(self.process.transfer_status):
            raise IllegalMove(f"sandbox {self._name}: QEMU refused: there is a migration process in progress")

    async def _answer(self, command: str) -> None:
        """What every command has in common: it takes a turn, and needs somebody who answers."""
        if self.faults.hang and self.alive:
            await asyncio.sleep(self.faults.give_up_s)
            raise Unavailable(
                f"sandbox {self._name}: QEMU did not answer {command} within {self.faults.give_up_s:g} s"
            )
        await asyncio.sleep(0)
        if not self.alive:
            raise Unavailable(f"sandbox {self._name}: QEMU is gone or hung up during {command}")


class FakeVmm:
    """See `sandshift.vmm.machine.Vmm`.

    Args:
        world: where the VM processes live; another FakeVmm of the same world finds them again.
        program: what a guest does on its agent's port; the default answers "ping" with a count.
    """

    def __init__(self, world: FakeWorld | None = None, program: AgentProgram | None = None) -> None:
        self.world = world or FakeWorld()
        self._program = program or answer_pings

    async def start(self, spec: MachineSpec) -> FakeMachine:
        return await self._start(spec, incoming=False)

    async def start_incoming(self, spec: MachineSpec) -> FakeMachine:
        return await self._start(spec, incoming=True)

    async def start_from_template(self, spec: MachineSpec, template: Path) -> FakeMachine:
        machine = await self._start(spec, incoming=True)
        try:
            text = await asyncio.to_thread(template.read_text)
            _load(machine.process, text)
        except (ValueError, KeyError) as error:
            machine.process.die()
            raise Damaged(f"sandbox {spec.name} could not be loaded from {template}: {error}") from error
        except BaseException:
            machine.process.die()
            raise
        machine.process.state = RunState.PAUSED
        return machine

    async def reattach(self, spec: MachineSpec) -> FakeMachine | None:
        await asyncio.sleep(0)
        process = self.world.processes.get(spec.run_dir)
        return FakeMachine(process) if process is not None and process.alive else None

    async def _start(self, spec: MachineSpec, *, incoming: bool) -> FakeMachine:
        if (found := await self.reattach(spec)) is not None:
            raise AlreadyThere(f"sandbox {spec.name}: VM process {found.pid} runs in {spec.run_dir} already")
        pid = self.world.next_pid()
        boot_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{spec.shape.uuid} {pid}"))
        process = FakeProcess(pid, spec, self.world.log, incoming=incoming, boot_id=boot_id)
        process.clock_ahead_us = self.world.clock_ahead_us
        process.guest.write(0, boot_id.encode())
        await process.listen(spec.run_dir / AGENT_SOCKET, self._program)
        self.world.processes[spec.run_dir] = process
        return FakeMachine(process)


async def answer_pings(
    process: FakeProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """A guest's program: "ping" -> "pong N", "id", "dirty PAGES_PER_S", "still", "off". It runs when the vCPUs do."""
    while line := await reader.readline():
        await process.runs.wait()
        word, _, argument = line.decode().strip().partition(" ")
        guest = process.look()
        if word == "ping":
            guest.pings += 1
            writer.write(f"pong {guest.pings}\n".encode())
        elif word == "id":
            writer.write(f"{guest.boot_id}\n".encode())
        elif word == "dirty":
            guest.pages_per_s = float(argument)
            writer.write(b"dirtying\n")
        elif word == "still":
            guest.pages_per_s = 0.0
            writer.write(b"still\n")
        elif word == "off":
            process.power_off()
            return
        await writer.drain()


def _write_new(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)


def _load(process: FakeProcess, text: str) -> None:
    """Raises ValueError or KeyError: `text` is not a guest of that size."""
    document = json.loads(text)
    if document["memory"] != process.spec.shape.memory_bytes:
        raise ValueError("Size mismatch: pc.ram")
    process.guest.unpack_text(document["pages"])
    process.guest.take_state(document["state"])
