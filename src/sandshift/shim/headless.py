"""A shim that `delete` brought back so that its session can go on: it ends itself when there is nothing left to do here.

containerd has its answer and will call no more, so nobody else would. While the guest runs here the shim stays: it is the
sandbox's only door.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sandshift.shim.migration.desk import Desk
    from sandshift.shim.places import Places
    from sandshift.shim.sandbox import LiveSandbox

FORSAKEN_S: Final = 60.0
"""How long it stays with nothing to do: whoever drove the session may still ask how it ended, or begin another."""
LOOK_S: Final = 1.0


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


def forget(places: Places) -> None:
    """What `delete` would have removed. Last statements and reports stay: they are the host's. Blocks."""
    import shutil  # noqa: PLC0415 - with three compressors

    for folder in (places.run_dir, places.state_dir):
        shutil.rmtree(folder, ignore_errors=True)
