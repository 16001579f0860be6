"""The link on the event loop: connections as `ttrpc.Transport`, on the host and in the guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from sandshift.link.endpoint import GuestEnd, HostEnd
from sandshift.link.stream import Stream
from sandshift.link.wire import Wire

LINGER_S: Final = 1.0
"""How long `close` waits for what was written to be taken."""
GUEST_LOOK_S: Final = 1.0
"""How often the guest looks at a port that nobody is connected to, should a wake-up ever be missed."""
_READS_MAX: Final = 8
"""Reads per turn of the event loop, so that nothing else waits long."""

End = HostEnd | GuestEnd


class LinkConnection:
    """One epoch as a byte stream. Has the methods of `ttrpc.Transport`."""

    def __init__(self, stream: Stream, pump: Pump) -> None:
        self._stream = stream
        self._pump = pump
        self._changed = asyncio.Event()
        self._is_closing = False
        self._goodbye: asyncio.TimerHandle | None = None

    @property
    def epoch(self) -> int:
        return self._stream.epoch

    async def read(self, bytes_max: int) -> bytes:
        """Up to `bytes_max` bytes, as soon as there are some; empty: the connection is over."""
        while True:
            if data := self._stream.receiving.read(bytes_max, time.monotonic()):
                self._pump.kick()
                return data
            if self._stream.is_gone or self._is_closing:
                return b""
            await self._wait()

    def write(self, data: bytes) -> None:
        """Send `data`, in the end. After the connection is over it goes nowhere."""
        if not self._stream.is_gone and not self._is_closing:
            self._stream.sending.write(data)
            self._pump.kick()

    async def drain(self) -> None:
        """Wait until there is room for more.

        Raises:
            ConnectionResetError: the connection is over.
        """
        while self._stream.sending.room_bytes <= 0 and not self._stream.is_gone:
            await self._wait()
        if self._stream.is_gone:
            raise ConnectionResetError("the link's connection is over")

    async def flush(self) -> None:
        """Wait until the other side has taken all that was written, or the connection is over."""
        while not self._stream.sending.is_all_taken and not self._stream.is_gone:
            await self._wait()

    def close(self) -> None:
        """Say goodbye once all that was written is taken, or after LINGER_S. Idempotent."""
        if not self._is_closing:
            self._is_closing = True
            self._goodbye = asyncio.get_running_loop().call_later(LINGER_S, self.abort)
            self._pump.kick()
            self.changed()

    async def closed(self) -> None:
        """Wait for the end of the connection, whoever ends it."""
        while not self._stream.is_gone:
            await self._wait()

    def abort(self) -> None:
        """Say goodbye at once. Idempotent."""
        if not self._stream.is_gone:
            self._pump.end(self._stream)
            self._stream.is_gone = True
        self.changed()

    def changed(self) -> None:
        """Wake whoever waits: bytes came, room came, or the end."""
        if self._is_closing and not self._stream.is_gone and self._stream.sending.is_all_taken:
            self.abort()
        if self._goodbye is not None and self._stream.is_gone:
            self._goodbye.cancel()
        self._changed.set()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Pump:
    """Moves bytes between an end and its wire, and calls its timer. One turn does all that can be done now."""

    def __init__(self, end: End, on_turn: Callable[[], None], on_cut: Callable[[], None]) -> None:
        """`on_turn`: something may have changed for a connection. `on_cut`: the wire is at its end."""
        self._end = end
        self._on_turn = on_turn
        self._on_cut = on_cut
        self._loop = asyncio.get_running_loop()
        self._wire: Wire | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._kick: asyncio.Handle | None = None

    def attach(self, descriptor: int) -> None:
        """Use `descriptor` from now on; owned by the pump."""
        self.detach()
        self._wire = Wire(descriptor, self._turn)
        self._turn()

    def detach(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        for handle in (self._timer, self._kick):
            if handle is not None:
                handle.cancel()
        self._timer = self._kick = None

    def kick(self) -> None:
        """There may be something to send: send it in the next turn of the event loop."""
        if self._kick is None and self._wire is not None:
            self._kick = self._loop.call_soon(self._send_and_arm)

    def look(self) -> None:
        """Do what can be done now, without having been woken."""
        self._turn()

    def end(self, stream: Stream) -> None:
        """`stream` is over by our own will: tell the other side."""
        if self._wire is None:
            return
        with contextlib.suppress(OSError):
            if isinstance(self._end, HostEnd):
                self._wire.write([self._end.farewell()])
            elif self._end.stream is stream:
                self._end.close()
                self._send()

    def _turn(self) -> None:
        try:
            is_cut = self._receive()
            self._send()
        except OSError:
            is_cut = True
        if is_cut:
            self._on_cut()
        self._arm()
        self._on_turn()

    def _receive(self) -> bool:
        """Read what is there. Whether the other side is away."""
        if self._wire is None:
            return False
        for _ in range(_READS_MAX):
            data = self._wire.read()
            if data is None:
                return False
            if not data:
                return True
            self._end.feed(data, time.monotonic())
        self._loop.call_soon(self._turn)
        return False

    def _send_and_arm(self) -> None:
        self._kick = None
        try:
            self._send()
        except OSError:
            self._on_cut()
        self._arm()

    def _send(self) -> None:
        if self._wire is None:
            return
        self._wire.write(())
        while not self._wire.is_blocked and (buffers := self._end.next_output(time.monotonic())):
            self._wire.write(buffers)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at_s = self._end.next_timer_s()
        if at_s is not None and self._wire is not None:
            self._timer = self._loop.call_later(max(0.0, at_s - time.monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._end.on_timer(time.monotonic())
        self._send_and_arm()


class HostLink:
    """The host's end over the Unix socket of the virtio-serial port. `connection` is its one connection.

    Usable at once: what is written waits until the guest's vCPUs run and its agent answers. If the socket is cut and can
    be connected to again, the connection goes on as if nothing had happened; if it cannot, the connection is over.
    """

    def __init__(self, path: str, epoch: int) -> None:
        self._path = path
        self._end = HostEnd(epoch)
        self._pump = Pump(self._end, self._on_turn, self._on_cut)
        self.connection = LinkConnection(self._end.stream, self._pump)

    @classmethod
    def connect(cls, path: str, *, epoch: int | None = None) -> HostLink:
        """Connect to the socket at `path`, without waiting for the guest.

        Raises:
            OSError: nobody listens there.
        """
        link = cls(path, int.from_bytes(os.urandom(8), "big") if epoch is None else epoch)
        link._pump.attach(_connected(path))
        return link

    @property
    def is_open(self) -> bool:
        """The guest's agent has answered."""
        return self._end.is_open

    async def close(self) -> None:
        """Give what was written LINGER_S to arrive, say goodbye and close the socket. Idempotent."""
        self.connection.close()
        await self.connection.closed()
        self._pump.detach()

    def abort(self) -> None:
        self.connection.abort()
        self._pump.detach()

    def _on_turn(self) -> None:
        if self._end.stream.is_gone:
            self._pump.detach()
        self.connection.changed()

    def _on_cut(self) -> None:
        self._pump.detach()
        if self._end.stream.is_gone:
            return
        try:
            if not self._end.is_open:  # so that a listener which hangs up at once is not called for ever
                raise ConnectionResetError
            descriptor = _connected(self._path)
        except OSError:
            self._end.stream.is_gone = True
            self.connection.changed()
            return
        self._end.wire_renewed()
        self._pump.attach(descriptor)


class GuestLink:
    """The guest's end over the port's one descriptor, which is never closed and survives every migration."""

    def __init__(self, descriptor: int) -> None:
        self._end = GuestEnd()
        self._current: LinkConnection | None = None
        self._opened: asyncio.Queue[LinkConnection] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._pump = Pump(self._end, self._on_turn, lambda: None)
        self._pump.attach(descriptor)
        self._look = self._loop.call_later(GUEST_LOOK_S, self._look_again)

    async def connections(self) -> AsyncIterator[LinkConnection]:
        """Each connection that a host opens. Those before it are over by then."""
        while True:
            yield await self._opened.get()

    def close(self) -> None:
        self._look.cancel()
        if self._current is not None:
            self._current.abort()
        self._pump.detach()

    def _on_turn(self) -> None:
        stream = self._end.stream
        if self._current is not None:
            self._current.changed()
        if stream is not None and (self._current is None or self._current.epoch != stream.epoch):
            self._current = LinkConnection(stream, self._pump)
            self._opened.put_nowait(self._current)

    def _look_again(self) -> None:
        self._pump.look()
        self._look = self._loop.call_later(GUEST_LOOK_S, self._look_again)


def _connected(path: str) -> int:
    """A non-blocking descriptor, connected to the Unix socket at `path`. A leading NUL: an abstract one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connecting:
        connecting.connect(path)
        return connecting.detach()
