"""Two hosts with real shims and real VMs as a target of the suite."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final, Self

from sandshift.conformance.answers import Skipped
from sandshift.conformance.side import Side
from sandshift.conformance.target import GuestDoes
from sandshift.fleet.host import Host, start_shim
from sandshift.fleet.launch import run_process
from sandshift.sandbox.model import MIGRATION_ANNOTATION
from tests.conformance.counter import make_bundle
from tests.lab import Lab, open_lab
from tests.system.pair import DIRTIER, NAMESPACE, SANDBOX, Pair, pair

LIMITS: Final = {
    "stall_s": 8.0,
    "orphan_s": 9.0,
    "cancel_s": 4.0,
    "qmp_command_s": 8.0,
    "agent_reply_s": 15.0,
    "handover_frame_s": 3.0,
    "containers_max": 4,
}
"""Short enough to be waited for, long enough for a machine under load (creating a container took 10 s at a load of 13)."""
WRITE_MIB: Final = 16
END_S: Final = 4.0
"""A session is Transferring by then."""
OVERRIDES: Final = {"vm": {"shared_memory": True}, "migration.limits": LIMITS}
"""Shared memory is what checksum_verification needs."""


class HostWithEvents(Host):
    """A host whose shims are told where events go, as containerd would."""

    @property
    def events_path(self) -> Path:
        return Path(self.config.places.run_dir) / "events.sock"

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "TTRPC_ADDRESS": str(self.events_path)}


class RealHouse:
    """Fresh shims and a fresh VM on every reset, in one lab. Use as a context manager; needs root."""

    def __init__(self) -> None:
        self.limits: Mapping[str, float] = LIMITS
        self._whole = contextlib.AsyncExitStack()
        self._pair = contextlib.AsyncExitStack()
        self._lab: Lab | None = None
        self.bundle = ""
        self._hosts: Pair | None = None

    async def __aenter__(self) -> Self:
        self._lab = await self._whole.enter_async_context(open_lab(overrides=OVERRIDES))
        folder = self._whole.enter_context(tempfile.TemporaryDirectory(prefix="conformance-bundle-"))
        self.bundle = str(await asyncio.to_thread(make_bundle, Path(folder)))
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

    @property
    def event_sockets(self) -> Mapping[Side, str]:
        sockets = {}
        for side in Side:
            host = self._host(side)
            assert isinstance(host, HostWithEvents)
            sockets[side] = str(host.events_path)
        return sockets

    async def reset(self) -> bool:
        await self._fresh({})
        return True

    async def pin(self) -> None:
        await self._fresh({MIGRATION_ANNOTATION: "false"})

    async def _fresh(self, annotations: Mapping[str, str]) -> None:
        await self._pair.aclose()
        assert self._lab is not None
        self._hosts = await self._pair.enter_async_context(
            pair(self._lab, annotations=annotations, kind=HostWithEvents)
        )

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

    async def guest(self, does: GuestDoes) -> None:
        assert self._hosts is not None
        if does is GuestDoes.WRITE:
            await run_process(self._hosts.s, ("python3", "-c", DIRTIER.format(mib=WRITE_MIB, pause_s=0)))
        else:
            command = f"sleep {END_S:g}; busybox {does.value} -f"
            await run_process(self._hosts.s, ("sh", "-c", command), process_id="end")

    @contextlib.asynccontextmanager
    async def silent(self, side: Side) -> AsyncIterator[None]:
        """QEMU stands still, and its guest with it."""
        assert self._hosts is not None
        shim = self._hosts.s if side is Side.SOURCE else self._hosts.d
        pidfd = os.pidfd_open((await shim.status()).qemu_pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            yield
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)


def _wait_for_end(pidfd: int) -> None:

    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll(5000)
