"""The agent's process: process 1 of the guest. Opens the port, serves every host that comes, reaps orphans."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

import ttrpc
from sandshift.agent.port import open_port
from sandshift.agent.service import Agent
from sandshift.agent.system import System
from sandshift.agent.table import Table
from sandshift.link.transport import GuestLink, LinkConnection

CALLS_MAX = 1024
"""At the same time, per connection: every process may be waited for and read."""


def main() -> None:
    """Serve until the machine is off."""
    descriptor = open_port()
    asyncio.run(serve(descriptor, Table(), System(), reap_orphans=os.getpid() == 1))


async def serve(descriptor: int, table: Table, system: System, *, reap_orphans: bool = False) -> None:
    """Serve the Agent service to each connection on `descriptor`; the newest one ends those before it.

    What processes there are is kept in `table`, across all connections.
    """
    if reap_orphans:
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, table.reap_all)
    server = ttrpc.Server(max_concurrent_calls=CALLS_MAX)
    server.register(Agent(table, system))
    link = GuestLink(descriptor)
    serving: set[asyncio.Task[None]] = set()
    try:
        async for connection in link.connections():
            task = asyncio.create_task(_serve_one(server, connection), name=f"serve-{connection.epoch:016x}")
            serving.add(task)
            task.add_done_callback(serving.discard)
    finally:
        for task in serving:
            task.cancel()
        link.close()


async def _serve_one(server: ttrpc.Server, connection: LinkConnection) -> None:
    """One connection from its first to its last call. What goes wrong ends it, and the host opens another."""
    try:
        await server.serve_connection(connection)
    except Exception as error:  # noqa: BLE001  (process 1 may not end)
        print(f"sandshift agent: connection {connection.epoch:016x}: {error!r}", file=sys.stderr, flush=True)  # noqa: T201
    finally:
        with contextlib.suppress(Exception):
            connection.abort()
