"""A fake VM process: lives in the FakeWorld as a real one lives on its host, whoever is connected to it.

Time is the running loop's clock, so a simulation's virtual time is its time. Faults are asked for by name; the machine
suite holds for it as for QEMU as long as none is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sandshift.errors import PeerProtocolError
from sandshift.vmm.events import EventFanout
from sandshift.vmm.fake_guest import PAGE_BYTES, FakeGuest
from sandshift.vmm.fake_stream import FakeStream, FrameKind
from sandshift.vmm.machine import (
    ChannelSecurity,
    MachineEvent,
    MachineSpec,
    MigrationInfo,
    MigrationStatus,
    RunState,
    TransferSettings,
)
from sandshift.vmm.transfer import is_under_way

NOMINAL_BYTES_PER_S: Final = 1 << 30
"""Speed of the channel when the settings set no limit."""
PAGES_PER_FRAME: Final = 16
DEVICE_STATE_S: Final = 0.003
"""How long the last, small part takes."""
STALL_LOOK_S: Final = 0.01

AgentProgram = Callable[["FakeProcess", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Faults:
    """What goes wrong, until it is unset."""

    hang: bool = False
    """Commands get no answer, and the guest's agent answers nobody."""
    give_up_s: float = 10.0
    """How long a command waits for its answer then: `limits.qmp_command_s`."""
    refuse_start: str = ""
    """`run_vcpus` fails with these words."""
    refuse_out: str = ""
    """`migrate_out` fails with these words."""
    fail_out: str = ""
    """The next transfer out fails after its first pass, with these words."""
    fail_in: str = ""
    """The next guest that comes in is refused at its end, with these words."""
    stall: bool = False
    """The transfer stands still, in or out."""


@dataclass(frozen=True, slots=True)
class VcpuRun:
    """One line of the log of who ran: at `at_s` of the loop's clock, `name` began or ceased to run guest `uuid`."""

    at_s: float
    uuid: str
    name: str
    running: bool


class RunLog:
    """Every start and stop of every fake VM's virtual CPUs."""

    def __init__(self) -> None:
        self.entries: list[VcpuRun] = []

    def runners(self, uuid: str) -> frozenset[str]:
        """Names of the VMs that run this guest now."""
        now: set[str] = set()
        for entry in self.entries:
            if entry.uuid == uuid:
                (now.add if entry.running else now.discard)(entry.name)
        return frozenset(now)

    def most_at_once(self, uuid: str) -> int:
        """How many VMs ran this guest at the worst moment. More than 1 is a split brain."""
        now: set[str] = set()
        most = 0
        for entry in self.entries:
            if entry.uuid == uuid:
                (now.add if entry.running else now.discard)(entry.name)
                most = max(most, len(now))
        return most


@dataclass
class _Transfer:
    """One transfer, out or in."""

    status: MigrationStatus = MigrationStatus.NONE
    error: str = ""
    passes: int = 0
    sent_bytes: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0
    stopped_s: float = 0.0
    was_running: bool = False
    settings: TransferSettings = field(default_factory=lambda: TransferSettings(0, 20))
    go_on: asyncio.Event = field(default_factory=asyncio.Event)


class FakeProcess:
    """State and behaviour of one fake VM process. FakeMachine is how a shim talks to it."""

    clock_ahead_us = 0
    """How far this host's wall clock is ahead of the loop's time."""

    def __init__(self, pid: int, spec: MachineSpec, log: RunLog, *, incoming: bool, boot_id: str) -> None:
        self.pid = pid
        self.spec = spec
        self.alive = True
        self.returncode: int | None = None
        self.stderr = ""
        self.faults = Faults()
        self.state = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        self.guest = FakeGuest(boot_id)
        self.fanout = EventFanout()
        self.runs = asyncio.Event()
        """Set while the virtual CPUs run: what an agent's program waits for."""
        self._log = log
        self._transfer = _Transfer()
        self._task_transfer: asyncio.Task[None] | None = None
        self._kept_fd = -1
        self._agent_server: asyncio.Server | None = None

    # --- time and virtual CPUs

    def look(self) -> FakeGuest:
        """The guest as it is now."""
        self.guest.advance(self._now_s(), self._transfer.settings.throttle_percent)
        return self.guest

    def start(self) -> None:
        if self.guest.running:
            return
        self.look().running = True
        self.state = RunState.RUNNING
        self.runs.set()
        self._note(running=True)
        self.say("RESUME")

    def stop(self, state: RunState = RunState.PAUSED) -> None:
        was_running = self.guest.running
        self.look().running = False
        self.runs.clear()
        if was_running:
            self._note(running=False)
            self.say("STOP")
        if was_running or self.state is RunState.PRELAUNCH or state is not RunState.PAUSED:
            self.state = state

    def die(self, returncode: int = -9, stderr: str = "") -> None:
        """The process is gone, with everything it held. Idempotent."""
        if not self.alive:
            return
        if self.guest.running:
            self.look().running = False
            self.runs.clear()
            self._note(running=False)
        self.alive = False
        self.returncode = returncode
        self.stderr += stderr
        self.state = RunState.DEAD
        if self._task_transfer is not None:
            self._task_transfer.cancel()
        self.drop_channel()
        self.close_agent()
        data = {"returncode": returncode, "stderr": self.stderr}
        self.fanout.finish(MachineEvent("DEAD", data, self._now_us()))

    def power_off(self, *, reason: str = "guest-shutdown") -> None:
        """The guest ends itself; `guest-reset`: by a reboot, which ends QEMU too."""
        self.stop(RunState.SHUTDOWN)
        self.say("SHUTDOWN", {"guest": True, "reason": reason})
        self.die(returncode=0)

    def panic(self) -> None:
        """The guest's kernel panics, which ends QEMU too."""
        self.stop(RunState.GUEST_PANICKED)
        self.say("GUEST_PANICKED", {"action": "shutdown"})
        self.power_off(reason="guest-panic")

    def say(self, name: str, data: dict[str, object] | None = None) -> None:
        self.fanout.emit(MachineEvent(name, data or {}, self._now_us()))

    # --- the agent's port

    async def listen(self, path: Path, program: AgentProgram) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await program(self, reader, writer)
            writer.close()

        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
        self._agent_server = await asyncio.start_unix_server(serve, path)

    def close_agent(self) -> None:
        if self._agent_server is not None:
            self._agent_server.close()
            self._agent_server = None

    # --- the kept channel

    def keep_channel(self, channel_fd: int) -> None:
        self.drop_channel()
        self._kept_fd = os.dup(channel_fd)

    def drop_channel(self) -> None:
        if self._kept_fd >= 0:
            os.close(self._kept_fd)
            self._kept_fd = -1

    # --- transfers

    @property
    def transfer_status(self) -> MigrationStatus:
        return self._transfer.status

    def info(self) -> MigrationInfo:
        now = self._transfer
        ended = now.ended_s or self._now_s()
        remaining = 0 if now.status is MigrationStatus.COMPLETED else self.look().dirty_count * PAGE_BYTES
        return MigrationInfo(
            status=now.status,
            error=now.error,
            total_ms=round((ended - now.began_s) * 1000) if now.passes else 0,
            downtime_ms=round((ended - now.stopped_s) * 1000) if now.stopped_s else 0,
            ram_total_bytes=self.spec.shape.memory_bytes if now.passes else 0,
            ram_transferred_bytes=now.sent_bytes,
            ram_remaining_bytes=remaining if now.passes else 0,
            dirty_bytes_per_s=round(self.guest.pages_per_s * PAGE_BYTES) if now.passes else 0,
            bytes_per_s=self._bytes_per_s() if now.passes else 0,
            passes=now.passes,
            throttle_percent=now.settings.throttle_percent,
        )

    def begin_out(self, channel_fd: int, security: ChannelSecurity, settings: TransferSettings) -> None:
        self._transfer = _Transfer(settings=settings, began_s=self._now_s(), was_running=self.guest.running)
        stream = FakeStream(channel_fd)
        self._task_transfer = asyncio.create_task(
            self._send(stream, security), name=f"fake out {self.spec.name}"
        )

    def begin_in(self, channel_fd: int, security: ChannelSecurity) -> None:
        self._transfer = _Transfer(began_s=self._now_s())
        stream = FakeStream(channel_fd)
        self._task_transfer = asyncio.create_task(
            self._receive(stream, security), name=f"fake in {self.spec.name}"
        )

    def go_on(self) -> None:
        self._transfer.go_on.set()

    def tune(self, settings: TransferSettings) -> None:
        self.look()
        self._transfer.settings = settings

    async def cancel(self) -> None:
        task = self._task_transfer
        if task is None or not is_under_way(self._transfer.status) or self.state is RunState.INMIGRATE:
            return
        self._become(MigrationStatus.CANCELLING)
        task.cancel()
        await asyncio.wait([task])

    async def _send(self, stream: FakeStream, security: ChannelSecurity) -> None:
        """Task: sees its own failures, which end as the transfer's status."""
        try:
            await self._send_all(stream, security)
        except asyncio.CancelledError:
            stream.shut_down()
            self._source_goes_on(MigrationStatus.CANCELLED, "")
        except (OSError, EOFError, PeerProtocolError) as error:
            stream.shut_down()
            self._source_goes_on(
                MigrationStatus.FAILED, f"Unable to use the channel: {str(error) or 'Broken pipe'}"
            )
        except _Refused as error:
            stream.shut_down()
            self._source_goes_on(MigrationStatus.FAILED, str(error))
        finally:
            stream.close()

    async def _send_all(self, stream: FakeStream, security: ChannelSecurity) -> None:
        now = self._transfer
        self._become(MigrationStatus.SETUP)
        await stream.send(FrameKind.HELLO, self._hello(security))
        await _expect(stream, FrameKind.WELCOME)
        self._pass()
        self._become(MigrationStatus.ACTIVE)
        self.look().take_dirty()
        await self._send_pages(stream, sorted(self.guest.pages))
        if self.faults.fail_out:
            raise _Refused(self.faults.fail_out)
        while self._remaining_ms() > now.settings.downtime_limit_ms:
            self._pass()
            await self._send_pages(stream, self.look().take_dirty())
        self._pass()
        self.stop(RunState.FINISH_MIGRATE)
        now.stopped_s = self._now_s()
        self._become(MigrationStatus.PRE_SWITCHOVER)
        await now.go_on.wait()
        self._become(MigrationStatus.DEVICE)
        self._pass()
        await self._send_pages(stream, self.guest.take_dirty())
        await asyncio.sleep(DEVICE_STATE_S)
        await stream.send(FrameKind.LAST, json.dumps(self.guest.state()).encode())
        await _expect(stream, FrameKind.LOADED)
        now.ended_s = self._now_s()
        self.state = RunState.POSTMIGRATE
        self._become(MigrationStatus.COMPLETED)

    async def _send_pages(self, stream: FakeStream, pages: list[int]) -> None:
        for start in range(0, len(pages), PAGES_PER_FRAME):
            some = pages[start : start + PAGES_PER_FRAME]
            await self._pause_while_stalled()
            await asyncio.sleep(len(some) * PAGE_BYTES / self._bytes_per_s())
            await stream.send(FrameKind.PAGES, self.look().packed(some))
            self._transfer.sent_bytes += len(some) * PAGE_BYTES

    def _source_goes_on(self, status: MigrationStatus, error: str) -> None:
        if not self.alive:
            return
        now = self._transfer
        now.ended_s = self._now_s()
        now.error = error
        if self.state is RunState.FINISH_MIGRATE:
            self.state = RunState.PAUSED
            if now.was_running:
                self.start()
        self._become(status)

    async def _receive(self, stream: FakeStream, security: ChannelSecurity) -> None:
        """Task: as `_send`, for the other side."""
        now = self._transfer
        try:
            await self._receive_all(stream, security)
        except asyncio.CancelledError:
            stream.shut_down()
        except (OSError, EOFError, PeerProtocolError, _Refused) as error:
            stream.shut_down()
            now.error = f"load of migration failed: {str(error) or 'Input/output error'}"
            now.ended_s = self._now_s()
            if self.alive:
                self._become(MigrationStatus.FAILED)
        finally:
            stream.close()

    async def _receive_all(self, stream: FakeStream, security: ChannelSecurity) -> None:
        self._become(MigrationStatus.SETUP)
        kind, payload = await stream.receive()
        self._become(MigrationStatus.ACTIVE)
        if kind is not FrameKind.HELLO:
            raise PeerProtocolError("not a migration stream")
        if reason := _difference(json.loads(payload), json.loads(self._hello(security))):
            await self._refuse(stream, reason)
        await stream.send(FrameKind.WELCOME)
        while True:
            await self._pause_while_stalled()
            kind, payload = await stream.receive()
            if kind is FrameKind.LAST:
                break
            self.guest.unpack(payload)
        if self.faults.fail_in:
            await self._refuse(stream, self.faults.fail_in)
        self.guest.take_state(json.loads(payload))
        self.guest.advance(self._now_s())
        self.state = RunState.PAUSED
        await stream.send(FrameKind.LOADED)
        self._transfer.ended_s = self._now_s()
        self._become(MigrationStatus.COMPLETED)

    async def _refuse(self, stream: FakeStream, reason: str) -> None:
        self.stderr += reason
        await stream.send(FrameKind.REFUSED, reason.encode())
        raise _Refused(reason)

    def _hello(self, security: ChannelSecurity) -> bytes:
        shape = self.spec.shape
        must_be_equal = {
            "key": hashlib.sha256(security.psk).hexdigest() if security.psk else "",
            "uuid": shape.uuid,
            "machine type": shape.machine_type,
            "memory": shape.memory_bytes,
            "vcpus": shape.vcpus,
            "devices": sorted([device.driver, device.bus, device.address] for device in shape.devices),
        }
        return json.dumps(must_be_equal).encode()

    async def _pause_while_stalled(self) -> None:
        # Looked at again and again: faults are set and unset without a word.
        while self.faults.stall:  # noqa: ASYNC110
            await asyncio.sleep(STALL_LOOK_S)

    def _remaining_ms(self) -> float:
        return self.look().dirty_count * PAGE_BYTES / self._bytes_per_s() * 1000

    def _bytes_per_s(self) -> int:
        return self._transfer.settings.bandwidth_bytes_per_s or NOMINAL_BYTES_PER_S

    def _pass(self) -> None:
        self._transfer.passes += 1
        self.say("MIGRATION_PASS", {"pass": self._transfer.passes})

    def _become(self, status: MigrationStatus) -> None:
        self._transfer.status = status
        self.say("MIGRATION", {"status": status.value})

    def _note(self, *, running: bool) -> None:
        self._log.entries.append(VcpuRun(self._now_s(), self.spec.shape.uuid, self.spec.name, running))

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _now_us(self) -> int:
        return int(self._now_s() * 1_000_000) + self.clock_ahead_us


class _Refused(Exception):
    """One side says no; its text is what the other is told."""


async def _expect(stream: FakeStream, kind: FrameKind) -> None:
    got, payload = await stream.receive()
    if got is FrameKind.REFUSED:
        raise _Refused(f"Sibling indicated error: {payload.decode()}")
    if got is not kind:
        raise PeerProtocolError(f"expected {kind.name}, got {got.name}")


def _difference(theirs: dict[str, object], ours: dict[str, object]) -> str:
    return next(
        (
            f"{key} received is {theirs.get(key)} and local is {ours[key]}"
            for key in ours
            if theirs.get(key) != ours[key]
        ),
        "",
    )
