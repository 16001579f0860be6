"""A coordinator that dies by SIGKILL at a named step: run as a program of its own.

python killed_coordinator.py SOURCE_CONFIG DESTINATION_CONFIG SANDBOX SESSION SIDE CALL before|after
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from sandshift.fleet.calls import Calls
from sandshift.fleet.driver import migrate
from sandshift.fleet.host import Host
from sandshift.fleet.request import Migration
from sandshift.fleet.saga import Call, Step
from sandshift.session.states import Side


def main() -> None:
    source, destination, sandbox, session, side, call, moment = sys.argv[1:]
    fatal = Step(Side[side], Call[call])
    make = Calls.make

    async def deadly(self: Calls, step: Step, *, receipt: bytes = b"") -> None:
        if step == fatal and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        await make(self, step, receipt=receipt)
        if step == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    Calls.make = deadly  # type: ignore[method-assign]
    migration = Migration(
        source=Host.load(Path(source)),
        destination=Host.load(Path(destination)),
        sandbox_id=sandbox,
        session_id=session,
    )
    asyncio.run(migrate(migration))


if __name__ == "__main__":
    main()
