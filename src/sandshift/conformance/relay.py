"""The channel between the two shims, with a suite in the middle that can stop reading, let bytes drip, or cut it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Final

from sandshift.conformance.side import Side
from sandshift.wire.migration import messages_pb2

SO_COOKIE: Final = 57
"""Source: include/uapi/asm-generic/socket.h."""
CHUNK_BYTES: Final = 256 << 10


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _address = server.accept()
    for end in (one, other):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


def descriptor_of(end: socket.socket, **wrong: int) -> bytes:
    """A SocketDescriptor of one of this process's sockets; `wrong` says otherwise about single fields."""
    true = {
        "version": 1,
        "pid": os.getpid(),
        "fd": end.fileno(),
        "so_cookie": int.from_bytes(end.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little"),
        "family": int(end.family),
        "type": int(socket.SOCK_STREAM),
        "protocol": end.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL),
    }
    return messages_pb2.SocketDescriptor(**(true | wrong)).SerializeToString()


class Relay:
    """Two connections, one to hand to each shim, and what goes between them.

    Bytes from the source wait for the gate; those from the destination pass always.
    """

    def __init__(self, *, flowing: bool) -> None:
        self.ends: dict[Side, socket.socket] = {}
        self._near: dict[Side, socket.socket] = {}
        self.ended = {side: asyncio.Event() for side in Side}
        """The shim of this side has ended its connection. Noticed once the gate is open."""
        self._gate = asyncio.Event()
        self._budget: int | None = None
        for side in Side:
            self.ends[side], self._near[side] = tcp_pair()
            self._near[side].setblocking(False)  # noqa: FBT003
        if flowing:
            self._gate.set()
        self._tasks = [
            asyncio.create_task(self._pump(Side.SOURCE, gated=True), name="relay forth"),
            asyncio.create_task(self._pump(Side.DESTINATION, gated=False), name="relay back"),
        ]

    def hold(self) -> None:
        """Read nothing more from the source."""
        self._gate.clear()

    def flow(self) -> None:
        self._budget = None
        self._gate.set()

    def drip(self, size_bytes: int) -> None:
        """Let at most this much more pass from the source."""
        self._budget = size_bytes
        self._gate.set()

    def handed(self, side: Side) -> None:
        """The shim has its copy: ours is closed, so that the shim's end alone keeps the connection."""
        self.ends[side].close()

    def cut(self) -> None:
        """Both connections are gone, as with a broken network."""
        for task in self._tasks:
            task.cancel()
        for near in self._near.values():
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)
            near.close()

    async def close(self) -> None:
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for end in self.ends.values():
            end.close()

    async def _pump(self, side: Side, *, gated: bool) -> None:
        """Task: an error of one side ends the other."""
        loop = asyncio.get_running_loop()
        near, far = self._near[side], self._near[side.peer]
        with contextlib.suppress(OSError):
            while True:
                if gated:
                    await self._gate.wait()
                size = CHUNK_BYTES if self._budget is None or not gated else self._budget
                data = await loop.sock_recv(near, size)
                if not data:
                    break
                if gated:
                    await self._gate.wait()  # It may have been closed while this was being read.
                await loop.sock_sendall(far, data)
                if gated and self._budget is not None:
                    self._budget -= len(data)
                    if self._budget <= 0:
                        self._gate.clear()
        self.ended[side].set()
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_WR)
