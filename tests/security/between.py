"""Somebody between the two hosts: passes the channel's bytes on until told to hold, then plays either side."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from sandshift.session.statement import FrameReader
from tests.shim.house import TwoHosts, channel

READ_BYTES = 64 << 10


class Between:
    """Two TCP connections where the hosts believe there is one."""

    def __init__(self) -> None:
        self._ends: dict[str, socket.socket] = {}
        self._given: dict[str, socket.socket] = {}
        for side in ("source", "destination"):
            self._given[side], self._ends[side] = channel()
            self._ends[side].setblocking(False)
        self.passes = True
        self.heard = {side: FrameReader() for side in self._ends}
        self.frames: dict[str, list[bytes]] = {side: [] for side in self._ends}
        """What each side has said since `hold`, frame by frame."""
        self.closed = {side: asyncio.Event() for side in self._ends}
        """That side has ended its connection."""
        self._tasks = [
            asyncio.create_task(self._pump("source", "destination")),
            asyncio.create_task(self._pump("destination", "source")),
        ]

    async def give(self, hosts: TwoHosts) -> None:
        """Both hosts get their ends."""
        await hosts.d.give_socket(hosts.session, self._given["destination"])
        await hosts.s.give_socket(hosts.session, self._given["source"])
        for end in self._given.values():
            end.close()

    def hold(self) -> None:
        """From now on nothing is passed on; what comes is kept in `frames`."""
        self.passes = False

    async def say(self, side: str, data: bytes) -> None:
        """To `side`, as if the other had said it."""
        await asyncio.get_running_loop().sock_sendall(self._ends[side], data)

    def hang_up(self, side: str) -> None:
        self._ends[side].shutdown(socket.SHUT_RDWR)

    async def _pump(self, side: str, other: str) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(self._ends[side], READ_BYTES):
                if self.passes:
                    await loop.sock_sendall(self._ends[other], data)
                else:
                    self.frames[side] += self.heard[side].feed(data)
        self.closed[side].set()
        if self.passes:
            with contextlib.suppress(OSError):
                self._ends[other].shutdown(socket.SHUT_WR)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in (*self._ends.values(), *self._given.values()):
            end.close()


@contextlib.asynccontextmanager
async def between_hosts(hosts: TwoHosts) -> AsyncIterator[Between]:
    """The move is complete and nothing is decided; from now on whoever is in between says what it likes."""
    await hosts.prepare()
    between = Between()
    try:
        await between.give(hosts)
        await hosts.transfer()
        await both_have_spoken(hosts)
        between.hold()
        yield between
    finally:
        await between.close()


async def both_have_spoken(hosts: TwoHosts) -> None:
    """The source's first frame has reached the destination: only then does the destination ever write."""
    async with asyncio.timeout(5):
        while cells(hosts)[1] != "READY" or session_of(hosts, "destination").party.peer is None:
            await asyncio.sleep(0.001)


def session_of(hosts: TwoHosts, side: str):  # type: ignore[no-untyped-def]
    server = getattr(hosts, side).server
    assert server is not None
    return server.desk.require_active().session


def cells(hosts: TwoHosts) -> tuple[str, str]:
    return session_of(hosts, "source").party.cell.name, session_of(hosts, "destination").party.cell.name


async def finish_by_receipts(hosts: TwoHosts) -> None:
    """Forward over a dead channel, as right-to-run.md section 8 says. STOP on the source comes first and is UNAVAILABLE."""
    with contextlib.suppress(Exception):
        await hosts.s.finalize(hosts.session, 1, (await hosts.d.status()).session.receipt)
    await hosts.d.finalize(hosts.session, 2, (await hosts.s.status()).session.receipt)
    await hosts.s.finalize(hosts.session, 1, (await hosts.d.status()).session.receipt)
