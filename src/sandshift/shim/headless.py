"""Shims that nobody else would end: each ends itself when there is nothing to do for it here.

One that `delete` brought back so that its session can go on: containerd has its answer and will call no more. While the guest
runs here the shim stays: it is the sandbox's only door. And one whose `start` was answered to nobody, for containerd had gone.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sandshift.shim.migration.desk import Desk
    from sandshift.shim.places import Places
    from sandshift.shim.sandbox import LiveSandbox
    from ttrpc import Server

FORSAKEN_S: Final = 60.0
"""How long it stays with nothing to do: whoever drove the session may still ask how it ended, or begin another."""
LOOK_S: Final = 1.0
UNVISITED_S: Final = 60.0
"""How long a new shim waits for its first caller; containerd connects as soon as `start` has answered."""


async def forsaken(
    sandbox: LiveSandbox, desk: Desk, *, after_s: float = FORSAKEN_S, look_s: float = LOOK_S
) -> None:
    """Returns once no session has been open here, and no VM been here, for `after_s`."""
    loop = asyncio.get_running_loop()
    needed_at_s = loop.time()
    while True:
        if desk.active is not None or sandbox.machine is not None:
            needed_at_s = loop.time()
        elif loop.time() - needed_at_s >= after_s:
            return
        await asyncio.sleep(look_s)


async def unvisited(server: Server, sandbox: LiveSandbox, *, after_s: float = UNVISITED_S) -> None:
    """Returns if nobody has connected within `after_s` and there is no sandbox; else never."""
    await asyncio.sleep(after_s)
    if server.connections_taken or sandbox.places.sandbox_file.exists():
        await asyncio.Event().wait()


def forget(places: Places) -> None:
    """What `delete` would have removed. Last statements and reports stay: they are the host's. Blocks."""
    import shutil  # noqa: PLC0415 - with three compressors

    for folder in (places.run_dir, places.state_dir):
        shutil.rmtree(folder, ignore_errors=True)
