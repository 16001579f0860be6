"""One output stream of a process: bytes by offset, kept until they are acknowledged. Pure."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

STREAM_BYTES_MAX: Final = 2 << 20
"""What a stream keeps; more is not read from the process, which then blocks in its write."""
ALL_STREAMS_BYTES: Final = 32 << 20
"""Above this much in all streams together a stream keeps no more than STREAM_BYTES_MIN: small guests have many processes."""
STREAM_BYTES_MIN: Final = 64 << 10
_CHUNK_BYTES: Final = 64 << 10
"""Small pieces are put together up to this."""


class Budget:
    """What all streams together hold."""

    def __init__(self, bytes_max: int = ALL_STREAMS_BYTES) -> None:
        self.bytes_max = bytes_max
        self.used_bytes = 0

    @property
    def is_spent(self) -> bool:
        return self.used_bytes >= self.bytes_max


class OutputBuffer:
    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._chunks: list[bytes | bytearray] = []
        self._offsets: list[int] = []
        """Where each chunk begins."""
        self.acknowledged = 0
        """Everything below is forgotten."""
        self.end = 0
        self.is_ended = False
        """The process has closed the stream: nothing more comes."""

    @property
    def is_full(self) -> bool:
        held = self.end - self.acknowledged
        return held >= (STREAM_BYTES_MIN if self._budget.is_spent else STREAM_BYTES_MAX)

    def append(self, data: bytes) -> None:
        last = self._chunks[-1] if self._chunks else b""
        if isinstance(last, bytearray) and len(last) + len(data) <= _CHUNK_BYTES:
            last += data
        else:
            self._chunks.append(data if len(data) >= _CHUNK_BYTES else bytearray(data))
            self._offsets.append(self.end)
        self.end += len(data)
        self._budget.used_bytes += len(data)

    def acknowledge(self, offset: int) -> None:
        """Forget what is below `offset`. Repeats and numbers that cannot be do nothing."""
        if not self.acknowledged < offset <= self.end:
            return
        self._budget.used_bytes -= offset - self.acknowledged
        self.acknowledged = offset
        count = bisect_right(self._offsets, offset) - 1
        if offset == self.end:
            count = len(self._chunks)
        del self._chunks[:count]
        del self._offsets[:count]

    def holds(self, offset: int) -> bool:
        """Whether reading may begin at `offset`."""
        return self.acknowledged <= offset <= self.end

    def read(self, offset: int, bytes_max: int) -> bytes:
        """Up to `bytes_max` bytes from `offset` on, which the buffer must hold; empty: none are there yet."""
        index = bisect_right(self._offsets, offset) - 1
        if offset >= self.end or index < 0:
            return b""
        parts: list[bytes | bytearray | memoryview] = []
        skip = offset - self._offsets[index]
        while index < len(self._chunks) and bytes_max > 0:
            chunk = self._chunks[index]
            part: bytes | memoryview | bytearray = chunk
            if skip or len(chunk) > bytes_max:
                part = memoryview(chunk)[skip : skip + bytes_max]
            parts.append(part)
            bytes_max -= len(part)
            skip, index = 0, index + 1
        return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)
