"""What both ends of a connection share: reading into the frame reader, joined writes, back-pressure, the coarse timer.

Writes of one turn of the loop go out as one: a frame each would cost a system call each. While bytes that arrived are being
worked on, everything that is answered at once is held back to the end of that work; outside of it a frame goes out at once
when its call is the only one, and with the next turn otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from typing import Any, Final, Protocol, cast

from ttrpc.aio.waiter import Waiter
from ttrpc.deadlines import Deadlines
from ttrpc.errors import ProtocolViolation
from ttrpc.frames import HEADER_BYTES, Frame, FrameReader
from ttrpc.inbox import InboxLimits

WRITE_BYTES_HIGH: Final = 256 << 10
"""Above this much that the peer has not taken, senders wait."""
FLUSH_PIECES: Final = 64
"""While a batch is worked on, what has been answered is written each so many pieces (a frame has two): so the peer works on
the first half while we work on the second."""
STREAM_FLUSH_BYTES: Final = 64 << 10
"""A stream's messages are joined to writes of at least this, as far as they come without a pause."""
STREAM_TURN_BYTES: Final = 256 << 10
"""After this much a stream that never waits lets others have a turn."""
TIMER_S_MAX: Final = 3600.0
"""The timer looks again after this long, however far the next deadline is."""


class Calls(Protocol):
    """What the shell needs of the pure core, of either end."""

    out: list[bytes]
    overfull: set[Any]

    def relieve(self, call: Any) -> None: ...


class Connection(asyncio.BufferedProtocol):
    """One connection, from either end."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, calls: Calls, reader: FrameReader, limits: InboxLimits
    ) -> None:
        self._loop = loop
        self._calls = calls
        self._reader = reader
        self._patience_s = limits.patience_s
        self._transport: asyncio.Transport | None = None
        self._working = False
        """Bytes that arrived are being worked on: their end flushes."""
        self._flush_due = False
        self._joined_bytes = 0
        """Of stream messages that have not been written yet."""
        self._turn_bytes = 0
        """Of stream messages that have been written since a sender last waited."""
        self._writable = True
        self._writers: list[Waiter] = []
        self._reading = True
        self._patience: dict[Any, asyncio.TimerHandle] = {}
        """Readers in `overfull`, each with the timer that ends patience with it."""
        self.deadlines: Deadlines[Any] = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        self.lost = False

    def new_waiter(self) -> Waiter:
        return Waiter(self._loop)

    # What the two ends do differently.

    @abstractmethod
    def _receive(self, frames: list[Frame]) -> None:
        """Act on frames."""

    @abstractmethod
    def _expire(self, call: Any) -> None:
        """The deadline of a call has passed."""

    @abstractmethod
    def _ended(self, error: Exception | None) -> None:
        """The connection is gone."""

    def _give_up(self, call: Any) -> None:
        """A reader was too slow for too long."""

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = stream = cast("asyncio.Transport", transport)
        stream.set_write_buffer_limits(high=WRITE_BYTES_HIGH)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        self._working = True
        try:
            self._receive(self._reader.filled(nbytes))
        except ProtocolViolation as error:
            self.cut(error)
        finally:
            self._working = False
            if self._calls.out:
                self.flush()
            if self._calls.overfull:
                self.balance_reading()

    def eof_received(self) -> bool:
        """ttrpc knows no half-closed connection: everything in flight ends."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._writable = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for patience in self._patience.values():
            patience.cancel()
        self._patience.clear()
        self._calls.out.clear()
        self._ended(exc)
        self._resume_writers()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._resume_writers()
        self.balance_reading()

    def _resume_writers(self) -> None:
        writers, self._writers = self._writers, []
        for waiter in writers:
            waiter.resume_soon()

    # Writing.

    def flush(self) -> None:
        """Write what has collected."""
        self._flush_due = False
        self._turn_bytes += self._joined_bytes
        self._joined_bytes = 0
        out = self._calls.out
        if not out:
            return
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        if self._transport is not None and not self.lost:
            self._transport.write(data)

    def flush_soon(self, *, alone: bool) -> None:
        """Frames were added: write them with others of this turn, or at once when the call is `alone`."""
        if self._working:
            if len(self._calls.out) >= FLUSH_PIECES:
                self.flush()
            return
        if self._flush_due:
            return
        if alone:
            self.flush()
        else:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def added(self, message_bytes: int) -> bool:
        """A stream's message was added: join it with others. Whether its sender has to wait for its `turn` now."""
        self._joined_bytes += message_bytes + HEADER_BYTES
        if self._joined_bytes >= STREAM_FLUSH_BYTES:
            self.flush()
        elif not self._flush_due:
            self.flush_soon(alone=False)
        return not self._writable or self._turn_bytes >= STREAM_TURN_BYTES

    async def turn(self) -> None:
        """Let others have their turn, and wait while the peer does not keep up."""
        if self._writable:
            await asyncio.sleep(0)
        else:
            await self.until_writable()
        self._turn_bytes = 0

    @property
    def writable(self) -> bool:
        """Whether the peer keeps up with what we write."""
        return self._writable

    async def until_writable(self) -> None:
        """Wait until the peer has taken enough of what was written, or is gone."""
        while not self._writable:
            waiter = Waiter(self._loop)
            self._writers.append(waiter)
            try:
                await waiter
            finally:
                with contextlib.suppress(ValueError):
                    self._writers.remove(waiter)

    # Reading.

    def _wants_reading(self) -> bool:
        return not self._calls.overfull

    def balance_reading(self) -> None:
        """Stop or go on reading, as inboxes (and at a server, unsent answers) say."""
        self._watch_readers()
        wanted = self._wants_reading()
        if wanted is self._reading or self._transport is None or self.lost:
            return
        self._reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def relieve(self, call: Any) -> None:
        """The reader of this call has caught up."""
        self._calls.relieve(call)
        self.balance_reading()

    def _watch_readers(self) -> None:
        """Start patience with readers that have become too slow, and end it with those that have caught up."""
        overfull = self._calls.overfull
        for call in [call for call in self._patience if call not in overfull]:
            self._patience.pop(call).cancel()
        if self._patience_s is None:
            return
        for call in [call for call in overfull if call not in self._patience]:
            if self._patience_s:
                self._patience[call] = self._loop.call_later(self._patience_s, self._lose_patience, call)
            else:
                self._give_up(call)
                self.flush_soon(alone=False)

    def _lose_patience(self, call: Any) -> None:
        self._patience.pop(call, None)
        if not self.lost:
            self._give_up(call)
            self.flush()
            self.balance_reading()

    # Deadlines.

    def add_deadline(self, call: Any, timeout_s: float) -> int:
        """`_expire` will be called when this much time has passed; the answer is what `deadlines.discard` wants."""
        now_s = self._loop.time()
        due_s = now_s + timeout_s
        bucket = self.deadlines.add(call, due_s, now_s)
        if self._timer is None or due_s < self._timer_due_s:
            self._set_timer()
        return bucket

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = self.deadlines.next_due_s()
        if due_s is not None and not self.lost:
            self._timer_due_s = min(due_s, self._loop.time() + TIMER_S_MAX)
            self._timer = self._loop.call_at(self._timer_due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        for call in self.deadlines.expire(self._loop.time()):
            self._expire(call)
        self.flush()
        self._set_timer()

    # The end.

    def cut(self, error: Exception | None = None) -> None:
        """End the connection now, whatever has not been written."""
        del error
        if self._transport is not None and not self.lost:
            self._transport.abort()

    def close(self) -> None:
        """End the connection once what was written has been taken."""
        self.flush()
        if self._transport is not None and not self.lost:
            self._transport.close()
