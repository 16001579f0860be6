"""A coordinator as a process of its own, so that it can be killed: python -m tests.faults.coordinator A B SANDBOX SESSION PROGRAM"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from sandshift.fleet import host as hosts
from sandshift.fleet.driver import migrate
from sandshift.fleet.host import Host
from sandshift.fleet.request import Migration


def main() -> None:
    source, destination, sandbox, session, program = sys.argv[1:]
    hosts.shim_program = lambda: program
    migration = Migration(Host.load(Path(source)), Host.load(Path(destination)), sandbox, session)
    asyncio.run(migrate(migration))


if __name__ == "__main__":
    main()
