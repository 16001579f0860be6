"""The house of tests/shim as a target of the suite: both shims in this process, their VMs fake."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

from sandshift.config import Limits
from sandshift.conformance.side import Side
from tests.shim.house import FakeHost, HostClient

LIMITS: Final = {"stall_s": 0.8, "orphan_s": 4.0, "handover_frame_s": 0.3, "subscribers_max": 16}
"""Short enough to be waited for."""


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

    async def __aenter__(self) -> Self:
        await self.reset()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._take_down()

    @property
    def addresses(self) -> Mapping[Side, str]:
        return {side: host.socket_path for side, host in self.hosts.items()}

    async def reset(self) -> bool:
        await self._take_down()
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        limits = Limits(**LIMITS)  # type: ignore[arg-type]
        self.hosts = {side: FakeHost(folder, side.name.lower(), limits) for side in Side}
        for side, host in self.hosts.items():
            await host.start()
            client: HostClient = await host.client()
            await (client.start_sandbox() if side is Side.SOURCE else client.await_sandbox())
            await client.connection.close()
        return True

    async def _take_down(self) -> None:
        for host in self.hosts.values():
            if host.server is not None:
                await host.stop()
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
