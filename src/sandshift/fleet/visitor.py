"""A shim without a sandbox, started to answer a question on its host and ended afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from sandshift.fleet.calls import refuse_if_taken
from sandshift.fleet.host import Host, start_shim
from sandshift.fleet.shim_client import Shim, connect, end_shim


@contextlib.asynccontextmanager
async def visitor(host: Host, namespace: str, sandbox_id: str) -> AsyncIterator[Shim]:
    """A shim of that id on `host` for the time of the `async with`; afterwards nothing of it is left.

    Raises:
        AlreadyThere: the id is taken. And what `start_shim` raises.
    """
    await refuse_if_taken(host, namespace, sandbox_id)
    try:
        await start_shim(host, namespace, sandbox_id)
        async with contextlib.aclosing(await connect(host, namespace, sandbox_id)) as shim:
            yield shim
    finally:
        await end_shim(host, namespace, sandbox_id)
