"""Stopping a shim exactly at one of its steps: a trap is a file that says at which, set and sprung from outside.

A shim under test (`shim_under_test.py`) that comes to that step stops there, whole, tells the harness, and goes on only
when it is told to, if it still lives by then. Only shims that the harness started know of traps: the shim that is
installed has no such hook.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

TRAP_FILE: Final = "trap.json"
"""In the host's folder, beside its config.toml."""
TRAP_SOCKET: Final = "trap.sock"
"""In the lab's folder: where the harness waits."""
GO_ON: Final = b"g"
STOPPED_S: Final = 60.0
"""How long a shim stays stopped if nobody tells it to go on: the harness has died."""

# In the shim


class Hooks:
    """Told of every step of a shim. Stops it there if a trap says so."""

    def __init__(self, config_path: Path) -> None:
        self._trap = config_path.parent / TRAP_FILE
        self._socket = config_path.parent.parent / TRAP_SOCKET
        self._seen: tuple[str, int] = ("", 0)

    def step(self, point: str) -> None:
        """The shim is at `point`. Blocks the whole process while it is to stand still."""
        try:
            armed = json.loads(self._trap.read_bytes())
        except FileNotFoundError:
            return
        if armed["point"] != point:
            return
        name, seen = self._seen
        self._seen = (armed["id"], seen + 1 if name == armed["id"] else 1)
        if self._seen[1] < armed["count"]:
            return
        try:
            self._trap.unlink()
        except FileNotFoundError:
            return
        self._stand_still(point)

    def _stand_still(self, point: str) -> None:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(STOPPED_S)
            connection.connect(str(self._socket))
            connection.sendall(json.dumps({"point": point, "pid": os.getpid()}).encode() + b"\n")
            connection.recv(1)


# In the harness

Fault = Callable[[], Awaitable[None]]


class Traps:
    """The harness's side: one trap at a time. Made by `listening`."""

    def __init__(self) -> None:
        self.sprung = asyncio.Event()
        self.error: BaseException | None = None
        self._fault: Fault | None = None
        self._file: Path | None = None
        self._count = 0

    def arm(self, host_folder: Path, point: str, fault: Fault, *, count: int = 1) -> None:
        """When a shim of that host comes to `point` for the `count`-th time, `fault` is done while it stands still."""
        self.disarm()
        self.sprung.clear()
        self.error = None
        self._fault = fault
        self._count += 1
        self._file = host_folder / TRAP_FILE
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps({"id": str(self._count), "point": point, "count": count}))
        fresh.rename(self._file)

    def disarm(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        self._file = self._fault = None

    async def _on_shim(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readline()
            if (fault := self._fault) is not None:
                self._fault = None
                try:
                    await fault()
                except Exception as error:
                    self.error = error
                self.sprung.set()
            with contextlib.suppress(OSError):  # the shim itself may be the victim
                writer.write(GO_ON)
                await writer.drain()
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def listening(lab_folder: Path) -> AsyncIterator[Traps]:
    traps = Traps()
    server = await asyncio.start_unix_server(traps._on_shim, str(lab_folder / TRAP_SOCKET))
    try:
        yield traps
    finally:
        traps.disarm()
        server.close()
