"""The shells around a process's descriptors: output read while there is room for it, input written as it is taken."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import termios
from typing import Final

from sandshift.agent.output import ALL_STREAMS_BYTES, Budget, OutputBuffer

PIPE_BYTES: Final = 1 << 20
"""Asked of the kernel for each output pipe: fewer, larger reads."""
READ_BYTES: Final = 256 << 10
STDIN_BYTES_MAX: Final = 256 << 10
TERMINAL_SIDE_MAX: Final = 0xFFFF
_END_OF_INPUT: Final = b"\x04"
"""What a terminal's line discipline takes for the end of input."""


class OutputRoom(Budget):
    """The budget, and the streams that wait for room in it or in themselves."""

    def __init__(self, bytes_max: int = ALL_STREAMS_BYTES) -> None:
        super().__init__(bytes_max)
        self.waiting: set[OutputStream] = set()

    def wake(self) -> None:
        """There may be room: whoever has some goes on."""
        for stream in list(self.waiting):
            stream.resume_if_room()


class OutputStream:
    """Reads a descriptor into an OutputBuffer while there is room."""

    def __init__(self, descriptor: int, room: OutputRoom) -> None:
        self._room = room
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._is_reading = False
        self.buffer = OutputBuffer(room)
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(descriptor, False)
        self._resume()

    async def wait(self) -> None:
        """Wait until more came, or the end."""
        self._changed.clear()
        await self._changed.wait()

    def acknowledge(self, offset: int) -> None:
        self.buffer.acknowledge(offset)
        self._room.wake()

    def resume_if_room(self) -> None:
        if not self.buffer.is_full:
            self._resume()

    def forget(self) -> None:
        """Read no more and drop what is held."""
        self.close()
        self.buffer.acknowledge(self.buffer.end)
        self._room.wake()

    def close(self) -> None:
        """Read no more. Idempotent."""
        self._room.waiting.discard(self)
        if self._descriptor >= 0:
            self._pause()
            os.close(self._descriptor)
            self._descriptor = -1
        self.buffer.is_ended = True
        self._changed.set()

    def _resume(self) -> None:
        self._room.waiting.discard(self)
        if not self._is_reading and self._descriptor >= 0:
            self._is_reading = True
            self._loop.add_reader(self._descriptor, self._readable)

    def _pause(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._descriptor)

    def _readable(self) -> None:
        try:
            data = os.read(self._descriptor, READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal whose last process is gone
                raise
            data = b""
        if not data:
            self.close()
            return
        self.buffer.append(data)
        if self.buffer.is_full:
            self._pause()
            self._room.waiting.add(self)
        self._changed.set()


class InputStream:
    """Writes to a descriptor what `take` accepts, in order."""

    def __init__(self, descriptor: int, *, terminal: bool) -> None:
        self._descriptor = descriptor
        self._terminal = terminal
        self._loop = asyncio.get_running_loop()
        self._waiting = bytearray()
        self._changed = asyncio.Event()
        self._is_ending = False
        self._is_writing = False
        self.taken = 0
        """Bytes accepted so far."""
        os.set_blocking(descriptor, False)

    async def take(self, offset: int, data: bytes, *, eof: bool) -> int:
        """Accept the part of `data` that is new and fits, waiting for room; how far stdin is taken now.

        Raises:
            ValueError: `offset` lies beyond what was taken: bytes are missing.
        """
        if offset > self.taken:
            raise ValueError(f"stdin is taken up to {self.taken}, not to {offset}")
        while self._is_open and len(self._waiting) >= STDIN_BYTES_MAX:
            self._changed.clear()
            await self._changed.wait()
        fresh = data[self.taken - offset :]
        if self._is_open:
            fresh = fresh[: STDIN_BYTES_MAX - len(self._waiting)]
            self._waiting += fresh
        self.taken += len(fresh)
        if eof and self.taken >= offset + len(data):
            self._is_ending = True
        self._flush()
        return self.taken

    def resize_terminal(self, columns: int, rows: int) -> None:
        """Set the size of the terminal that it writes to, in characters. Once that is gone nothing happens.

        Raises:
            ValueError: there is no such size.
        """
        if not 0 <= columns <= TERMINAL_SIDE_MAX or not 0 <= rows <= TERMINAL_SIDE_MAX:
            raise ValueError(
                f"a terminal of {columns} columns and {rows} rows: up to {TERMINAL_SIDE_MAX} are possible"
            )
        if self._is_open:
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        """Close, and drop what is not written. Idempotent."""
        if self._descriptor >= 0:
            self._watch(writable=False)
            os.close(self._descriptor)
            self._descriptor = -1
        self._waiting.clear()
        self._changed.set()

    @property
    def _is_open(self) -> bool:
        return self._descriptor >= 0

    def _flush(self) -> None:
        if not self._is_open:
            return
        try:
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except BlockingIOError:
            self._watch(writable=True)
            self._changed.set()
            return
        except OSError:  # the process has closed its end: nobody will ever read it
            self.close()
            return
        self._watch(writable=False)
        self._changed.set()
        if self._is_ending:
            self._end()

    def _end(self) -> None:
        if self._terminal:
            self._is_ending = False
            with contextlib.suppress(OSError):
                os.write(self._descriptor, _END_OF_INPUT)
        else:
            self.close()

    def _watch(self, *, writable: bool) -> None:
        if writable and not self._is_writing:
            self._loop.add_writer(self._descriptor, self._flush)
        elif not writable and self._is_writing:
            self._loop.remove_writer(self._descriptor)
        self._is_writing = writable
