"""The two byte streams of one epoch: what was written, sent and taken, and what to send again. Pure; time is an argument."""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Final

from sandshift.link.frames import Frame, Kind, header, padding

SEND_BYTES_MAX: Final = 1 << 20
"""What may be written and not yet taken by the other side."""
RECEIVE_BYTES_MAX: Final = SEND_BYTES_MAX + (256 << 10)
"""What may be received and not yet read; more is dropped, and comes again."""
ACK_AFTER_BYTES: Final = SEND_BYTES_MAX // 4
JOIN_BYTES_MAX: Final = 16 << 10
"""Up to here copying is cheaper than a second buffer, which costs the guest an exit of its own."""
ACK_AFTER_S: Final = 0.02
RESEND_FIRST_S: Final = 0.25
RESEND_LAST_S: Final = 4.0
"""The wait for an answer doubles from the first to the last: a paused VM is asked seldom."""

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Segment:
    """The payload of one DATA frame, kept until it is taken."""

    offset: int
    length: int
    buffers: tuple[Buffer, ...]
    crc: int


class Sending:
    """One direction, outwards."""

    def __init__(self, payload_bytes_max: int) -> None:
        self._payload_bytes_max = payload_bytes_max
        self._unsent: deque[Buffer] = deque()
        self._segments: deque[Segment] = deque()
        """Sent at least once, not taken, in order."""
        self._again: deque[Segment] = deque()
        """Of those, what is to be sent again."""
        self._formed = 0
        self._arrived = 0
        """Up to here the other side has it, though perhaps not taken."""
        self._padding_due = False
        self._probing = False
        """After a silence one frame at a time goes out, until something is taken."""
        self._wait_s = RESEND_FIRST_S
        self._resend_at_s: float | None = None
        self.written = 0
        self.taken = 0

    @property
    def room_bytes(self) -> int:
        """How much may be written; 0 or less: wait."""
        return SEND_BYTES_MAX - (self.written - self.taken)

    @property
    def is_all_taken(self) -> bool:
        return self.taken == self.written

    @property
    def resend_at_s(self) -> float | None:
        return self._resend_at_s

    def write(self, data: bytes) -> None:
        if data:
            self._unsent.append(data)
            self.written += len(data)

    def on_taken(self, taken: int, now_s: float) -> None:
        """The other side has taken all bytes below `taken`. A number that cannot be is ignored."""
        if not self.taken < taken <= self._formed:
            return
        self.taken = taken
        while self._segments and self._segments[0].offset + self._segments[0].length <= taken:
            self._segments.popleft()
        self._wait_s = RESEND_FIRST_S
        self._resend_at_s = now_s + self._wait_s if self._segments else None

    def on_arrived(self, arrived: int) -> None:
        """The other side has all bytes below `arrived`, though it may not have taken them."""
        if self._arrived < arrived <= self._formed:
            self._arrived = arrived
        if self._probing:
            self._probing = False
            if (
                self._arrived < self._formed
            ):  # bytes were lost, and the other side is there: no need for patience
                self._wait_s = RESEND_FIRST_S
                self.rewind()

    def rewind(self) -> None:
        """Send all that has not arrived once more."""
        self._again = deque(
            segment for segment in self._segments if segment.offset + segment.length > self._arrived
        )

    def on_timer(self, now_s: float) -> None:
        if self._resend_at_s is None or now_s < self._resend_at_s:
            return
        self._again = deque(islice(self._segments, 1))
        self._padding_due = True
        self._probing = True
        self._wait_s = min(self._wait_s * 2, RESEND_LAST_S)
        self._resend_at_s = now_s + self._wait_s if self._segments else None

    def next_segment(self, now_s: float) -> tuple[bytes, Segment] | None:
        """What to send next: padding to put before it, and the segment. None: nothing, or not now."""
        while self._again and self._again[0].offset + self._again[0].length <= self.taken:
            self._again.popleft()
        if self._again:
            segment = self._again.popleft()
        elif self._unsent and not self._probing:
            segment = self._form()
        else:
            return None
        if self._resend_at_s is None:
            self._resend_at_s = now_s + self._wait_s
        before = padding(self._payload_bytes_max) if self._padding_due else b""
        self._padding_due = False
        return before, segment

    def _form(self) -> Segment:
        buffers: list[Buffer] = []
        length = crc = 0
        while self._unsent and length < self._payload_bytes_max:
            buffer = self._unsent.popleft()
            room = self._payload_bytes_max - length
            if len(buffer) > room:
                self._unsent.appendleft(memoryview(buffer)[room:])
                buffer = memoryview(buffer)[:room]
            crc = zlib.crc32(buffer, crc)
            length += len(buffer)
            buffers.append(buffer)
        segment = Segment(self._formed, length, tuple(buffers), crc)
        self._formed += length
        self._segments.append(segment)
        return segment


class Receiving:
    """One direction, inwards."""

    def __init__(self) -> None:
        self._ready: deque[bytes] = deque()
        self._told = 0
        """What the other side was last told as taken."""
        self._asked_from = -1
        """The gap that a RESEND was sent for."""
        self._resend_due = False
        self._ack_due = False
        self._ack_at_s: float | None = None
        self.arrived = 0
        """Up to here everything is here."""
        self.taken = 0
        """Up to here it was read."""

    @property
    def ready_bytes(self) -> int:
        return self.arrived - self.taken

    @property
    def ack_at_s(self) -> float | None:
        return self._ack_at_s

    def on_data(self, offset: int, payload: bytes) -> None:
        """Take the part of the payload that comes next; ask again for what is missing before it."""
        if offset > self.arrived:
            self._resend_due = self._resend_due or self._asked_from != self.arrived
            return
        fresh = payload[self.arrived - offset :] if offset < self.arrived else payload
        if not fresh:
            self._ack_due = True  # it was sent again: the other side does not know that it arrived
            return
        if self.ready_bytes + len(fresh) > RECEIVE_BYTES_MAX:
            return
        self._ready.append(fresh)
        self.arrived += len(fresh)

    def read(self, bytes_max: int, now_s: float) -> bytes:
        """Up to `bytes_max` bytes; empty: none are there."""
        parts: list[bytes] = []
        while self._ready and bytes_max > 0:
            part = self._ready.popleft()
            if len(part) > bytes_max:
                self._ready.appendleft(part[bytes_max:])
                part = part[:bytes_max]
            bytes_max -= len(part)
            parts.append(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.taken += len(data)
        if self.taken - self._told >= ACK_AFTER_BYTES:
            self._ack_due = True
        elif data and self._ack_at_s is None:
            self._ack_at_s = now_s + ACK_AFTER_S
        return data

    def on_timer(self, now_s: float) -> None:
        if self._ack_at_s is not None and now_s >= self._ack_at_s:
            self._ack_due = True

    def tell(self) -> int:
        """`taken`, for a frame that goes out now."""
        self._told = self.taken
        self._ack_due = False
        self._ack_at_s = None
        return self.taken

    def reply_due(self) -> Kind | None:
        """An ACK or a RESEND that should go out now."""
        if self._resend_due:
            self._resend_due = False
            self._asked_from = self.arrived
            return Kind.RESEND
        return Kind.ACK if self._ack_due else None

    def forget_gaps(self) -> None:
        """The wire begins anew: a RESEND sent before it counts no more."""
        self._asked_from = -1


class Stream:
    """Both directions of one epoch."""

    def __init__(self, epoch: int, payload_bytes_max: int) -> None:
        self.epoch = epoch
        self.sending = Sending(payload_bytes_max)
        self.receiving = Receiving()
        self.is_gone = False
        """The other side has ended this epoch: what is ready may still be read, nothing is sent."""

    def on_frame(self, frame: Frame, now_s: float) -> None:
        if frame.kind is Kind.GONE:
            self.is_gone = True
            return
        self.sending.on_arrived(frame.arrived)
        self.sending.on_taken(frame.taken, now_s)
        if frame.kind is Kind.DATA:
            self.receiving.on_data(frame.offset, frame.payload)
        elif frame.kind in (Kind.HELLO, Kind.RESEND):
            self.sending.rewind()

    def on_timer(self, now_s: float) -> None:
        self.sending.on_timer(now_s)
        self.receiving.on_timer(now_s)

    def next_timer_s(self) -> float | None:
        times = [at for at in (self.sending.resend_at_s, self.receiving.ack_at_s) if at is not None]
        return min(times, default=None)

    def next_output(self, now_s: float) -> list[Buffer]:
        """The buffers of the next frame to send; empty: nothing to send now."""
        if self.is_gone:
            return []
        if (reply := self.receiving.reply_due()) is not None:
            return [header(reply, self.epoch, arrived=self.receiving.arrived, taken=self.receiving.tell())]
        if (found := self.sending.next_segment(now_s)) is None:
            return []
        before, segment = found
        start = header(
            Kind.DATA,
            self.epoch,
            offset=segment.offset,
            arrived=self.receiving.arrived,
            taken=self.receiving.tell(),
            payload_bytes=segment.length,
            payload_crc=segment.crc,
        )
        if segment.length <= JOIN_BYTES_MAX:
            return [b"".join((before, start, *segment.buffers))]
        return [before + start, *segment.buffers]
