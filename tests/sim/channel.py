"""The connection between the two hosts: real sockets with a wire between them that is slow, silent or cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from typing import Final

from sandshift.fleet.channel import Channel

READ_BYTES: Final = 1 << 16
FULL_S: Final = 0.001
"""How long until a full socket is tried again."""


class Wire:
    """Carries bytes both ways. The shims and their VMs hold `channel`'s ends."""

    def __init__(self, delay_s: float) -> None:
        source, near = socket.socketpair()
        destination, far = socket.socketpair()
        self.channel = Channel(source, destination)
        self._ends = (near, far)
        self._ways = (_Way(near, far, delay_s), _Way(far, near, delay_s))
        self.cut_off = False

    def cut(self) -> None:
        """Both ends learn it at once; what was under way is lost."""
        self.cut_off = True
        for way in self._ways:
            way.close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def silence(self, *, to_destination: bool) -> None:
        """Nothing arrives any more in this direction, and nobody is told."""
        self._ways[0 if to_destination else 1].silent = True

    def stall(self, until_s: float) -> None:
        """Nothing arrives before `until_s` of the loop's clock."""
        for way in self._ways:
            way.not_before_s = max(way.not_before_s, until_s)


class _Way:
    """One direction. Order is kept."""

    def __init__(self, come_from: socket.socket, go_to: socket.socket, delay_s: float) -> None:
        self._from, self._to, self._delay_s = come_from, go_to, delay_s
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.silent = False
        self.not_before_s = 0.0
        for end in (come_from, go_to):
            end.setblocking(False)
        self._loop.add_reader(come_from, self._readable)

    def _readable(self) -> None:
        try:
            data = self._from.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._from)
        self._under_way.append((self._loop.time() + self._delay_s, data))
        self._arm()

    def _arm(self) -> None:
        if self._timer is None and self._under_way and not self._closed:
            self._timer = self._loop.call_at(max(self._under_way[0][0], self.not_before_s), self._arrive)

    def _arrive(self) -> None:
        self._timer = None
        if self._loop.time() < self.not_before_s:
            self._arm()
            return
        at_s, data = self._under_way.popleft()
        if not self.silent:
            try:
                self._deliver(at_s, data)
            except OSError:  # nobody is there to take it: the sender hears of that
                with contextlib.suppress(OSError):
                    self._from.shutdown(socket.SHUT_RDWR)
        self._arm()

    def _deliver(self, at_s: float, data: bytes) -> None:
        if not data:
            self._to.shutdown(socket.SHUT_WR)
            return
        try:
            sent = self._to.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._under_way.appendleft((max(at_s, self._loop.time() + FULL_S), data[sent:]))

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(OSError, ValueError):
            self._loop.remove_reader(self._from)
