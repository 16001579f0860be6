"""A shim without a sandbox, started to answer a question on its host and ended afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

from sandshift.errors import SandshiftError
from sandshift.fleet.calls import refuse_if_taken
from sandshift.fleet.host import Host, delete_shim, start_shim
from sandshift.fleet.shim_client import Shim, connect
from sandshift.wire.containerd import sandbox_pb2

SHUTDOWN_S: Final = 20.0


@contextlib.asynccontextmanager
async def visitor(host: Host, namespace: str, sandbox_id: str) -> AsyncIterator[Shim]:
    """A shim of that id on `host` for the time of the `async with`; afterwards nothing of it is left.

    Raises:
        AlreadyThere: the id is taken. And what `start_shim` raises.
    """
    await refuse_if_taken(host, namespace, sandbox_id)
    try:
        await start_shim(host, namespace, sandbox_id)
        shim = await connect(host, namespace, sandbox_id)
        async with contextlib.aclosing(shim):
            try:
                yield shim
            finally:
                request = sandbox_pb2.ShutdownSandboxRequest(sandbox_id=sandbox_id)
                with contextlib.suppress(SandshiftError):
                    await shim.said(shim.sandbox.shutdown_sandbox(request, timeout_s=SHUTDOWN_S))
    finally:
        await delete_shim(host, namespace, sandbox_id)
