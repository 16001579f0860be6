"""What QEMU does with a virtio-serial port: one host at a time, and bytes that get lost while none is connected."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path


class Port:
    """Listens on `path` for hosts; `guest_descriptor` is the guest's end, open for ever.

    Up to `lose_down` and `lose_up` bytes of what is carried next are swallowed, once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inner, outer = socket.socketpair()
        outer.setblocking(False)
        self._inner.setblocking(False)
        self.guest_descriptor = outer.detach()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(4)
        self._listening.setblocking(False)
        self._host: socket.socket | None = None
        self._connected = asyncio.Event()
        self.lose_down = self.lose_up = 0
        self.carried_down = self.carried_up = 0
        self.running = asyncio.Event()
        """Cleared: the vCPUs stand still, nothing reaches the guest."""
        self.running.set()
        self._tasks = [asyncio.create_task(job()) for job in (self._accept, self._carry_up)]

    async def cut(self) -> None:
        """Hang up on the host that is connected."""
        host = self._host
        if host is not None:
            host.shutdown(socket.SHUT_RDWR)
        while self._host is host:
            await asyncio.sleep(0)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await task
        if self._host is not None:
            self._host.close()
        self._listening.close()
        self._inner.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._host, _ = await loop.sock_accept(self._listening)
            self._host.setblocking(False)
            self._connected.set()
            with contextlib.suppress(OSError):
                await self._carry_down(self._host)
            self._connected.clear()
            self._host.close()
            self._host = None

    async def _carry_down(self, host: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(host, 65536):
            await self.running.wait()
            lost = min(self.lose_down, len(data))
            self.lose_down = 0
            self.carried_down += len(data) - lost
            await loop.sock_sendall(self._inner, data[lost:])

    async def _carry_up(self) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._inner, 65536):
            lost = min(self.lose_up, len(data))
            self.lose_up = 0
            self.carried_up += len(data) - lost
            if self._host is not None:
                with contextlib.suppress(OSError):
                    await loop.sock_sendall(self._host, data[lost:])
