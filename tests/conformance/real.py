"""Two hosts with real shims and real VMs as a target of the suite."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import AsyncIterator, Mapping
from typing import Final, Self

from sandshift.conformance.answers import Skipped
from sandshift.conformance.side import Side
from sandshift.fleet.host import Host, start_shim
from tests.lab import Lab, open_lab
from tests.system.pair import NAMESPACE, SANDBOX, Pair, pair

LIMITS: Final = {"stall_s": 4.0, "orphan_s": 8.0}
"""Short enough to be waited for, long enough for a machine under load."""
OVERRIDES: Final = {"vm": {"shared_memory": True}, "migration.limits": LIMITS}
"""Shared memory is what checksum_verification needs."""


class RealHouse:
    """Fresh shims and a fresh VM on every reset, in one lab. Use as a context manager; needs root."""

    def __init__(self) -> None:
        self.limits: Mapping[str, float] = LIMITS
        self._whole = contextlib.AsyncExitStack()
        self._pair = contextlib.AsyncExitStack()
        self._lab: Lab | None = None
        self._hosts: Pair | None = None

    async def __aenter__(self) -> Self:
        self._lab = await self._whole.enter_async_context(open_lab(overrides=OVERRIDES))
        await self.reset()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._pair.aclose()
        await self._whole.aclose()

    def _host(self, side: Side) -> Host:
        assert self._hosts is not None
        return self._hosts.a if side is Side.SOURCE else self._hosts.b

    @property
    def addresses(self) -> Mapping[Side, str]:
        return {side: str(self._host(side).config.shim_socket(NAMESPACE, SANDBOX)) for side in Side}

    async def reset(self) -> bool:
        await self._pair.aclose()
        assert self._lab is not None
        self._hosts = await self._pair.enter_async_context(pair(self._lab))
        return True

    async def restart(self, side: Side) -> None:
        assert self._hosts is not None
        shim = self._hosts.s if side is Side.SOURCE else self._hosts.d
        pid = (await shim.status()).shim_pid
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await asyncio.to_thread(_wait_for_end, pidfd)
        finally:
            os.close(pidfd)
        await start_shim(self._host(side), NAMESPACE, SANDBOX)

    @contextlib.asynccontextmanager
    async def hold_cancel(self, side: Side) -> AsyncIterator[None]:
        raise Skipped(f"a cancellation by QEMU cannot be held up ({side.value})")
        yield


def _wait_for_end(pidfd: int) -> None:

    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll(5000)
