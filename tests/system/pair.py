"""Two real hosts with real VMs, driven call by call over their shims' sockets: the caller decides what comes next."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.any_pb2 import Any as AnyMessage

import ttrpc
from sandshift.cli.demo.lab import Lab
from sandshift.fleet.channel import Channel, describe, make_channel
from sandshift.fleet.host import Host, delete_shim, start_shim
from sandshift.fleet.launch import Wish, launch, run_process
from sandshift.fleet.shim_client import Shim, connect
from sandshift.image import build
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o

NAMESPACE = "default"
SANDBOX = "box"
SESSION = "s-1"
STOP, RESUME = m.FINALIZE_ACTION_STOP, m.FINALIZE_ACTION_RESUME
DIRTIER = """
import time
b = bytearray({mib} << 20)
n = 0
while True:
    n += 1
    for i in range(0, len(b), 4096):
        b[i:i + 8] = n.to_bytes(8, 'big')
    print(n, flush=True)
    time.sleep({pause_s})
"""


@dataclass
class Pair:
    a: Host
    b: Host
    s: Shim
    d: Shim

    async def export(self, options: o.InitializeOptions | None = None, session: str = SESSION) -> AnyMessage:
        request = m.PrepareAndExportSandboxRequest(session_id=session)
        if options is not None:
            request.init_options.CopyFrom(options)
        return (await self.s.migration.prepare_and_export_sandbox(request, timeout_s=30)).config

    async def import_config(self, config: AnyMessage, session: str = SESSION) -> None:
        request = m.ImportSandboxRequest(
            session_id=session, sandbox_id_or_config=SANDBOX.encode(), config=config
        )
        await self.d.migration.import_sandbox(request, timeout_s=30)

    async def prepare(self, options: o.InitializeOptions | None = None) -> None:
        await self.import_config(await self.export(options))
        request = m.PrepareSandboxRequest(session_id=SESSION)
        if options is not None:
            request.init_options.CopyFrom(options)
        await self.d.migration.prepare_sandbox(request, timeout_s=30)

    async def connect(self) -> None:
        channel = await make_channel(self.a, self.b)
        try:
            await self.hand_over(channel)
        finally:
            channel.close()

    async def hand_over(self, channel: Channel) -> None:
        for shim, end in ((self.d, channel.destination), (self.s, channel.source)):
            await self.give_socket(shim, end)

    async def give_socket(self, shim: Shim, end: socket.socket) -> None:
        request = m.CreateDuplicateSocketRequest(session_id=SESSION, protocol_info=describe(end))
        await shim.migration.create_duplicate_socket(request, timeout_s=10)

    def transfers(self) -> list[asyncio.Task[m.TransferSandboxResponse]]:
        """TransferSandbox on destination and source, as tasks."""
        request = m.TransferSandboxRequest(session_id=SESSION)
        return [
            asyncio.create_task(shim.migration.transfer_sandbox(request, timeout_s=120))
            for shim in (self.d, self.s)
        ]

    async def ready(self, options: o.InitializeOptions | None = None) -> None:
        """All memory is on the destination, and nothing is decided."""
        await self.prepare(options)
        await self.connect()
        await self.complete(self.transfers())

    async def complete(self, transfers: list[asyncio.Task[m.TransferSandboxResponse]]) -> None:
        """Until everything is on the destination: its TransferSandbox may have answered before (contract 4.7)."""
        await asyncio.gather(*transfers)
        await self.wait_for_phase(self.d, o.PHASE_DONE)

    async def wait_for_phase(self, shim: Shim, phase: o.Phase.ValueType) -> None:
        async with asyncio.timeout(60):
            async with contextlib.aclosing(shim.notifications(SESSION)) as told:
                async for response in told:
                    if response.notification.phase == phase:
                        return

    async def finalize(self, shim: Shim, action: m.FinalizeAction.ValueType) -> None:
        request = m.FinalizeSandboxRequest(session_id=SESSION, action=action)
        await shim.migration.finalize_sandbox(request, timeout_s=30)

    async def cancel(self, shim: Shim) -> None:
        await shim.migration.cancel(m.CancelRequest(session_id=SESSION), timeout_s=30)

    async def clean_up(self, shim: Shim) -> None:
        await shim.migration.cleanup(m.CleanupRequest(session_id=SESSION), timeout_s=30)

    async def undo(self) -> None:
        """The documented way back, from wherever it is."""
        for shim in (self.s, self.d):
            await self.cancel(shim)
        await self.finalize(self.s, RESUME)
        await self.finalize(self.d, STOP)
        for shim in (self.s, self.d):
            await self.clean_up(shim)

    async def finish(self) -> None:
        await self.finalize(self.d, RESUME)
        await self.finalize(self.s, STOP)
        for shim in (self.s, self.d):
            await self.clean_up(shim)

    async def runners(self) -> list[str]:
        return [
            name
            for name, shim in (("source", self.s), ("destination", self.d))
            if (await shim.status()).vm_state == "running"
        ]

    async def boot_id(self, shim: Shim) -> str:
        return (await shim.status()).boot_id


@contextlib.asynccontextmanager
async def pair(
    lab: Lab,
    *,
    dirty_mib: int = 0,
    pause_s: float = 0.0,
    annotations: Mapping[str, str] | None = None,
    kind: type[Host] = Host,
) -> AsyncIterator[Pair]:
    """A sandbox that runs on host A (and dirties memory), a destination that awaits one on host B."""
    a, b = kind.load(lab.host_a.config_path), kind.load(lab.host_b.config_path)
    await asyncio.to_thread(build.build, Path(a.config.places.cache_dir))
    source = await launch(a, Wish(SANDBOX, annotations=annotations or {}))
    try:
        if dirty_mib:
            await run_process(source, ("python3", "-c", DIRTIER.format(mib=dirty_mib, pause_s=pause_s)))
        await start_shim(b, NAMESPACE, SANDBOX)
        destination = await connect(b, NAMESPACE, SANDBOX)
        request = sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX)
        request.annotations["io.sandshift.migration.destination"] = "true"
        await destination.sandbox.create_sandbox(request, timeout_s=10)
        both = Pair(a, b, source, destination)
        try:
            yield both
        finally:
            await both.s.close()
            await both.d.close()
    finally:
        for host in (a, b):
            # With a session still open `delete` would bring the shim back: the journal goes first.
            (host.config.sandbox_state_dir(NAMESPACE, SANDBOX) / "session").unlink(missing_ok=True)
            await delete_shim(host, NAMESPACE, SANDBOX)


def code_of(error: object) -> ttrpc.Code:
    """The code of what a call ended with; OK if it succeeded."""
    if not isinstance(error, BaseException):
        return ttrpc.Code.OK
    assert isinstance(error, ttrpc.StatusError), repr(error)
    return error.code


def destination_code_of(error: object) -> ttrpc.Code:
    """The same for a destination's TransferSandbox, which answers OK where nothing has arrived for 2 s (contract 4.7): on a
    busy machine that may come before the failure. Then it is counted as the failure."""
    code = code_of(error)
    return ttrpc.Code.UNAVAILABLE if code is ttrpc.Code.OK else code
