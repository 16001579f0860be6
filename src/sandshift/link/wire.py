"""A descriptor that bytes of the link come and go through, on the event loop.

Both ends use edge-triggered epoll: a virtio-serial port whose host side is not connected reports HUP for as long as that
lasts, and a level-triggered loop would spin on it. The epoll descriptor itself is what the event loop watches.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import Callable, Sequence
from typing import Final

READ_BYTES: Final = 256 << 10
BUFFERS_MAX: Final = 64
"""Per writev; IOV_MAX is 1024."""
_EVENTS: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLHUP | select.EPOLLET

Buffer = bytes | memoryview


class Wire:
    """Owns `descriptor`, which must be non-blocking. `on_wake` is called when it may be readable or writable again."""

    def __init__(self, descriptor: int, on_wake: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_wake = on_wake
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll(1)
        self._epoll.register(descriptor, _EVENTS)
        self._unwritten: list[Buffer] = []
        self._is_closed = False
        self._loop.add_reader(self._epoll.fileno(), self._woken)

    @property
    def is_blocked(self) -> bool:
        """Something is still unwritten."""
        return bool(self._unwritten)

    def read(self) -> bytes | None:
        """What is there; None: nothing now; empty: the other side is not connected (for a socket: never again).

        Raises:
            OSError: the descriptor is broken.
        """
        try:
            return os.read(self._descriptor, READ_BYTES)
        except BlockingIOError:
            return None

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Write `buffers` after what is still unwritten, as far as possible now; the rest is kept.

        Raises:
            OSError: the descriptor is broken.
        """
        self._unwritten += buffers
        while self._unwritten:
            try:
                written = os.writev(self._descriptor, self._unwritten[:BUFFERS_MAX])
            except BlockingIOError:
                return
            self._drop(written)

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            with contextlib.suppress(OSError):
                os.close(self._descriptor)

    def _woken(self) -> None:
        self._epoll.poll(0, 1)
        self._on_wake()

    def _drop(self, written: int) -> None:
        count = 0
        while count < len(self._unwritten) and written >= len(self._unwritten[count]):
            written -= len(self._unwritten[count])
            count += 1
        del self._unwritten[:count]
        if written:
            self._unwritten[0] = memoryview(self._unwritten[0])[written:]
