"""Letting a container's init go: it waits in the opening of a FIFO, and goes when somebody reads from that.

This is what `runc start` does, without the start of another Go program.
Source: runc libcontainer/container_linux.go, exec() and handleFifoResult(); the same in 1.0 to 1.3.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Final

from sandshift.agent.process import Process
from ttrpc import Code, StatusError

GATE: Final = "exec.fifo"
OPENS_S: Final = 20.0
"""How long the init may take to come to the gate."""


async def open_gate(state: Path, init: Process) -> None:
    """Let `init` go, whose container runc keeps in the folder `state`.

    Raises:
        StatusError: FAILED_PRECONDITION: the init has ended; DEADLINE_EXCEEDED: it does not come to the gate.
    """
    try:
        descriptor = os.open(state / GATE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = -1
    if descriptor < 0 or init.exit is not None:
        if descriptor >= 0:
            os.close(descriptor)
        raise StatusError(
            Code.FAILED_PRECONDITION, f"container {state.name} cannot be started: its init has ended"
        )
    try:
        await _passed(descriptor, state.name, init)
    finally:
        os.close(descriptor)
    with contextlib.suppress(FileNotFoundError):
        (state / GATE).unlink()


async def _passed(descriptor: int, name: str, init: Process) -> None:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def told() -> None:
        loop.remove_reader(descriptor)
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(descriptor, told)
    ending = asyncio.ensure_future(init.wait())
    try:
        await asyncio.wait({readable, ending}, timeout=OPENS_S, return_when=asyncio.FIRST_COMPLETED)
        if readable.done() and _drained(descriptor):
            return
    finally:
        loop.remove_reader(descriptor)
        ending.cancel()
    if init.exit is not None:
        raise StatusError(Code.FAILED_PRECONDITION, f"container {name} cannot be started: its init has ended")
    raise StatusError(Code.DEADLINE_EXCEEDED, f"container {name} did not start within {OPENS_S:g} s")


def _drained(descriptor: int) -> bool:
    """Whether the init has said that it goes."""
    with contextlib.suppress(BlockingIOError):
        return bool(os.read(descriptor, 64))
    return False
