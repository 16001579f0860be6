"""Byte transports other than a socket: anything that can read, write, drain and close can carry a ttrpc connection."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol


class Transport(Protocol):
    """A reliable stream of bytes, both ways."""

    async def read(self, n: int, /) -> bytes:
        """At most `n` bytes, at least one; empty at the end of the stream. Any exception ends the connection."""

    def write(self, data: bytes, /) -> None:
        """Take bytes to be sent. May buffer: `drain` is awaited before more is written than a bound."""

    async def drain(self) -> None:
        """Return when more may be written."""

    def close(self) -> None:
        """Close, after what has been written."""


class StreamTransport:
    """asyncio's StreamReader and StreamWriter as one `Transport`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, n: int, /) -> bytes:
        return await self._reader.read(n)

    def write(self, data: bytes, /) -> None:
        self._writer.write(data)

    async def drain(self) -> None:
        await self._writer.drain()

    def close(self) -> None:
        self._writer.close()


READ_BYTES = 64 << 10


class Pump(asyncio.Transport):
    """A `Transport` as asyncio's own protocols want to see it.

    One task reads (`_task_read`), one drains (`_task_drain`). Exceptions of either end the connection and reach its
    protocol's `connection_lost`.
    """

    def __init__(self, inner: Transport, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__()
        self._inner = inner
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._readable = asyncio.Event()
        self._readable.set()
        self._closing = False
        self._undrained_bytes = 0
        self._high_bytes = 64 << 10
        self._paused = False
        """The protocol has been told to write no more."""
        self._draining: asyncio.Task[None] | None = None
        protocol.connection_made(self)
        self._reading = self._loop.create_task(self._task_read(), name="ttrpc-pump-read")

    async def _task_read(self) -> None:
        reason: Exception | None = None
        try:
            while True:
                await self._readable.wait()
                data = await self._inner.read(READ_BYTES)
                if not data:
                    break
                # The protocol runs handlers and callers in place, which is allowed only outside of a task.
                fed: asyncio.Future[None] = self._loop.create_future()
                self._loop.call_soon(self._feed, data, fed)
                await fed
        except Exception as error:  # noqa: BLE001  # whatever the inner transport raises ends the connection
            reason = error
        finally:
            self._end(reason)

    def _feed(self, data: bytes, fed: asyncio.Future[None]) -> None:
        view = memoryview(data)
        try:
            while view and not self._closing:
                space = self._protocol.get_buffer(len(view))
                count = min(len(space), len(view))  # type: ignore[arg-type]  # a memoryview
                space[:count] = view[:count]  # type: ignore[index]
                view = view[count:]
                self._protocol.buffer_updated(count)
        finally:
            if not fed.done():
                fed.set_result(None)

    def _end(self, reason: Exception | None) -> None:
        if self._inner is not None:
            inner, self._closing = self._inner, True
            self._readable.set()
            try:
                inner.close()
            finally:
                self._loop.call_soon(self._lost, reason)

    def _lost(self, reason: Exception | None) -> None:
        protocol, self._protocol = self._protocol, _DEAF
        protocol.connection_lost(reason)

    def write(self, data: Any) -> None:
        if self._closing:
            return
        self._inner.write(bytes(data))
        self._undrained_bytes += len(data)
        if self._draining is None:
            self._draining = self._loop.create_task(self._task_drain(), name="ttrpc-pump-drain")
        if self._undrained_bytes > self._high_bytes and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    async def _task_drain(self) -> None:
        """Drain until all that was written has been taken."""
        try:
            while self._undrained_bytes:
                count = self._undrained_bytes
                await self._inner.drain()
                self._undrained_bytes -= count
                if self._paused and self._undrained_bytes <= self._high_bytes:
                    self._paused = False
                    self._protocol.resume_writing()
        except Exception:  # noqa: BLE001  # reading sees why, or abort() ends it
            self.abort()
        finally:
            self._draining = None

    def pause_reading(self) -> None:
        self._readable.clear()

    def resume_reading(self) -> None:
        self._readable.set()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        del low
        if high is not None:
            self._high_bytes = high

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        del name
        return default

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Close once everything written has been drained."""
        if not self._closing:
            self._closing = True
            self._loop.create_task(self._task_close(), name="ttrpc-pump-close")

    async def _task_close(self) -> None:
        if self._draining is not None:
            await asyncio.wait([self._draining])
        self._reading.cancel()

    def abort(self) -> None:
        self._closing = True
        self._reading.cancel()


class _Deaf(asyncio.BufferedProtocol):
    """Stands where the protocol was after it has been told that the connection is lost."""


_DEAF = _Deaf()
