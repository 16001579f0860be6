"""The house of tests/shim as a target of the suite: both shims in this process, their VMs fake."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

from sandshift.config import Limits
from sandshift.conformance.side import Side
from sandshift.conformance.target import GuestDoes
from sandshift.sandbox.model import MIGRATION_ANNOTATION
from sandshift.session.states import State
from sandshift.wire.containerd import sandbox_pb2
from tests.shim.house import SANDBOX, FakeHost, HostClient

LIMITS: Final = {
    "stall_s": 2.5,
    "orphan_s": 4.0,
    "cancel_s": 2.0,
    "qmp_command_s": 5.0,
    "agent_reply_s": 0.6,
    "handover_frame_s": 0.3,
    "containers_max": 4,
    "subscribers_max": 16,
}
"""Short enough to be waited for. A VM's silence outlasts the bound of a Cancel, so that each can be told from the other."""
WRITTEN_PAGES: Final = 2048
"""What a guest that writes without end goes over: more than is sent in a millisecond."""
PAGES_PER_S: Final = 5_000_000.0
LOOK_S: Final = 0.005
END_S: Final = 0.3
"""How long after the first bytes a guest ends itself that was told to."""


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """In memory where there is such a place: the shims write their journals durably, and that is not what is tried."""
    shm = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="sandshift-house-", dir=shm if shm.is_dir() else None)


class House:
    """Fresh hosts on every reset. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.hosts: dict[Side, FakeHost] = {}
        self.limits: Mapping[str, float] = LIMITS
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self.reset()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._take_down()

    @property
    def addresses(self) -> Mapping[Side, str]:
        return {side: host.socket_path for side, host in self.hosts.items()}

    @property
    def event_sockets(self) -> Mapping[Side, str]:
        return {side: str(self._folder / f"{side.name.lower()}-events.sock") for side in Side}

    @property
    def bundle(self) -> str:
        folder = self._folder / "bundle"
        if not folder.exists():
            (folder / "rootfs").mkdir(parents=True)
            config = {
                "ociVersion": "1.1.0",
                "process": {"args": ["flood"], "cwd": "/"},
                "root": {"path": "rootfs"},
            }
            (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    async def reset(self) -> bool:
        await self._fresh({})
        return True

    async def pin(self) -> None:
        await self._fresh({MIGRATION_ANNOTATION: "false"})

    async def _fresh(self, annotations: Mapping[str, str]) -> None:
        await self._take_down()
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        limits = Limits(**LIMITS)  # type: ignore[arg-type]
        self.hosts = {side: FakeHost(folder, side.name.lower(), limits) for side in Side}
        for side, host in self.hosts.items():
            host.events_path = self.event_sockets[side]
            await host.start()
            client: HostClient = await host.client()
            await (_start(client, annotations) if side is Side.SOURCE else client.await_sandbox())
            await client.connection.close()

    async def _take_down(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for host in self.hosts.values():
            if host.server is not None:
                await host.stop(push_s=0.0)  # Nobody listens any more.
            for process in list(host.world.processes.values()):
                process.die()
        if self.hosts:
            shutil.rmtree(self._folder / str(self._count), ignore_errors=True)
        self.hosts = {}

    async def restart(self, side: Side) -> None:
        await self.hosts[side].stop()
        await self.hosts[side].start()

    @contextlib.asynccontextmanager
    async def hold_cancel(self, side: Side) -> AsyncIterator[None]:
        """The VM answers no question about its transfer, which a cancellation begins with."""
        server = self.hosts[side].server
        assert server is not None
        machine: Any = server.sandbox.machine
        assert machine is not None
        released, original = asyncio.Event(), machine.migration_info

        async def held() -> Any:
            await released.wait()
            return await original()

        machine.migration_info = held
        try:
            yield
        finally:
            released.set()
            machine.migration_info = original

    async def guest(self, does: GuestDoes) -> None:
        process = self.hosts[Side.SOURCE].process
        guest = process.look()
        guest.working_set, guest.pages_per_s = WRITTEN_PAGES, PAGES_PER_S
        if (
            does is not GuestDoes.WRITE
        ):  # It writes on until then: a guest that was sent already cannot end itself.
            self._tasks.append(asyncio.create_task(self._end_guest(does), name=f"guest {does.value}"))

    async def _end_guest(self, does: GuestDoes) -> None:
        """Soon after both sides transfer: the suite lets only the first bytes pass until it has heard of this."""
        while not all(self._state(side) is State.TRANSFERRING for side in Side):
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(END_S)
        reason = "guest-reset" if does is GuestDoes.REBOOT else "guest-shutdown"
        self.hosts[Side.SOURCE].process.power_off(reason=reason)

    def _state(self, side: Side) -> State | None:
        server = self.hosts[side].server
        return server.desk.standing.state if server is not None else None

    @contextlib.asynccontextmanager
    async def silent(self, side: Side) -> AsyncIterator[None]:
        faults = self.hosts[side].process.faults
        faults.give_up_s = LIMITS["qmp_command_s"]
        faults.hang = True
        try:
            yield
        finally:
            faults.hang = False


async def _start(client: HostClient, annotations: Mapping[str, str]) -> None:
    request = sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX, annotations=annotations)
    await client.sandbox.create_sandbox(request)
    await client.sandbox.start_sandbox(sandbox_pb2.StartSandboxRequest(sandbox_id=SANDBOX))
