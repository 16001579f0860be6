"""Frames: ten bytes of header, big-endian, then the data.

    u32 length of the data | u32 stream id | u8 kind | u8 flags | data

`FrameReader` takes bytes in any pieces and gives whole frames. A frame above the message limit is read and dropped, and
shows up as an OVERSIZED frame without its data, so that one bad message costs one call and not the connection. Only a
length that no peer of good will sends (`FRAME_BYTES_CUT`) is a `ProtocolViolation`. Pure: no sockets, no clock.
"""

from __future__ import annotations

import struct
from typing import Final, TypeAlias

from ttrpc.errors import ProtocolViolation

HEADER: Final = struct.Struct(">IIBB")
HEADER_BYTES: Final = HEADER.size

REQUEST: Final = 1
RESPONSE: Final = 2
DATA: Final = 3
OVERSIZED: Final = 0x100
"""Added by the reader to the kind of a frame whose data was dropped; its data is then the length, 4 bytes big-endian."""

REMOTE_CLOSED: Final = 0x01
"""The sender sends nothing more on this stream."""
REMOTE_OPEN: Final = 0x02
"""On a Request: Data frames of the client follow."""
NO_DATA: Final = 0x04
"""The frame carries no message; without it zero bytes are an empty message."""
END_OF_STREAM: Final = REMOTE_CLOSED | NO_DATA

MESSAGE_BYTES_MAX: Final = 4 << 20
"""What every ttrpc implementation accepts, inclusive. It bounds the envelope, not the payload in it."""
FRAME_BYTES_CUT: Final = 64 << 20
"""A length above this cuts the connection: dropping it would keep the peer's other calls waiting for too long."""
BUFFER_BYTES: Final = 256 << 10
"""What is read at a time; grows for a single larger frame and shrinks again."""
STREAM_ID_MAX: Final = 0xFFFF_FFFF

Bytes: TypeAlias = bytes | bytearray
Frame: TypeAlias = tuple[int, int, int, Bytes]
"""Stream id, kind, flags, data."""

pack_header = HEADER.pack


def encode(stream_id: int, kind: int, flags: int, data: Bytes) -> bytes:
    """One frame.

    >>> encode(1, DATA, END_OF_STREAM, b"").hex(" ", -4)
    '00000000 00000001 0305'
    """
    return HEADER.pack(len(data), stream_id, kind, flags) + data


class FrameReader:
    """Bytes in, frames out. Either `feed` it, or read into `space()` and tell `filled()` how much (no copy)."""

    __slots__ = ("_buffer", "_cut", "_dropped", "_end", "_left", "_max", "_size", "_start")

    def __init__(
        self,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        frame_bytes_cut: int = FRAME_BYTES_CUT,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self._max = message_bytes_max
        self._cut = max(frame_bytes_cut, message_bytes_max)
        self._size = max(buffer_bytes, HEADER_BYTES)
        self._buffer = bytearray(self._size)
        # Unread bytes are _buffer[_start:_end].
        self._start = 0
        self._end = 0
        # The oversized frame that is being dropped, and how many of its bytes are still to come.
        self._dropped: Frame | None = None
        self._left = 0

    def feed(self, data: Bytes | memoryview) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            ProtocolViolation: a length above the hard bound. The reader must not be used any more.
        """
        frames: list[Frame] = []
        view = memoryview(data)
        while view:
            space = self.space()
            count = min(len(space), len(view))
            space[:count] = view[:count]
            view = view[count:]
            frames += self.filled(count)
        return frames

    def space(self) -> memoryview:
        """Where to put the next bytes; never empty. Valid until the next call of `filled`."""
        start, end = self._start, self._end
        buffer = self._buffer
        if start == end:
            if len(buffer) != self._size:
                self._buffer = buffer = bytearray(self._size)
            self._start = self._end = 0
            return memoryview(buffer)
        if start or end == len(buffer):
            self._make_room(start, end)
        return memoryview(self._buffer)[self._end :]

    def _make_room(self, start: int, end: int) -> None:
        """Move what is unread to the front, of a larger buffer where the frame needs one."""
        unread = self._buffer[start:end]
        needed = self._size
        if len(unread) >= HEADER_BYTES:
            needed = max(needed, HEADER_BYTES + int.from_bytes(unread[:4]))
        if needed != len(self._buffer):
            self._buffer = bytearray(needed)
        self._buffer[: len(unread)] = unread
        self._start, self._end = 0, len(unread)

    def filled(self, count: int) -> list[Frame]:
        """The frames that the next `count` bytes of `space()` complete.

        Raises:
            ProtocolViolation: a length above the hard bound. The reader must not be used any more.
        """
        frames: list[Frame] = []
        start = self._start
        end = self._end + count
        buffer = self._buffer
        maximum = self._max
        if self._dropped is not None:
            start = self._drop(start, end, frames)
        while end - start >= HEADER_BYTES:
            length, stream_id, kind, flags = HEADER.unpack_from(buffer, start)
            stop = start + HEADER_BYTES + length
            if length > maximum:
                if length > self._cut:
                    raise ProtocolViolation(
                        f"a frame of {length} bytes: at most {self._cut} are even skipped"
                    )
                self._dropped = stream_id, kind | OVERSIZED, flags, length.to_bytes(4)
                self._left = length
                start = self._drop(start + HEADER_BYTES, end, frames)
                continue
            if stop > end:
                break
            frames.append((stream_id, kind, flags, buffer[start + HEADER_BYTES : stop]))
            start = stop
        self._start = start
        self._end = end
        return frames

    def _drop(self, start: int, end: int, frames: list[Frame]) -> int:
        """Skip bytes of the oversized frame; its OVERSIZED frame comes when all have been skipped."""
        skipped = min(self._left, end - start)
        self._left -= skipped
        if not self._left and self._dropped is not None:
            frames.append(self._dropped)
            self._dropped = None
        return start + skipped
