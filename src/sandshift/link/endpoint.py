"""The two ends of the link: which epoch is in force, and what goes over the wire. Sans-IO; time is an argument.

The host's end lives as long as one host process is connected and has one epoch. The guest's end lives as long as the agent,
over all migrations and all host processes: each new epoch ends the connection of the one before.

A shell feeds what it read (`feed`), sends what `next_output` gives while the wire takes it, and calls `on_timer` at
`next_timer_s`. Bytes of the connection are read from and written to `stream`.
"""

from __future__ import annotations

from typing import Final

from sandshift.link.frames import Frame, FrameReader, Kind, header, padding
from sandshift.link.stream import Buffer, Stream

HOST_PAYLOAD_BYTES_MAX: Final = 16 << 10
"""Small: the host's bytes are the ones that a migration loses, and padding is as long as a frame."""
GUEST_PAYLOAD_BYTES_MAX: Final = 128 << 10
HELLO_FIRST_S: Final = 0.1
HELLO_LAST_S: Final = 2.0


class HostEnd:
    """The host's end: opens its epoch with HELLO and repeats that until the guest answers."""

    def __init__(self, epoch: int) -> None:
        self._reader = FrameReader()
        self.stream = Stream(epoch, HOST_PAYLOAD_BYTES_MAX)
        self.is_open = False
        """The guest has answered on this wire."""
        self._hello_due = True
        self._hellos = 0
        self._hello_wait_s = HELLO_FIRST_S
        self._hello_at_s: float | None = None

    def feed(self, data: bytes, now_s: float) -> None:
        for frame in self._reader.feed(data):
            if frame.epoch == self.stream.epoch:
                self._on_frame(frame, now_s)

    def wire_renewed(self) -> None:
        """The wire was cut and is there again, to the same guest: go on where the guest stands."""
        self._reader = FrameReader()
        self.is_open = False
        self._hello_due, self._hellos, self._hello_wait_s = True, 0, HELLO_FIRST_S

    def next_output(self, now_s: float) -> list[Buffer]:
        if self._hello_due and not self.stream.is_gone:
            self._hello_due = False
            self._hello_at_s = now_s + self._hello_wait_s
            self._hello_wait_s = min(self._hello_wait_s * 2, HELLO_LAST_S)
            self._hellos += 1
            # Ever more seldom: what a VM that stands still has not read, it reads all at once when it runs.
            is_padded = self._hellos > 1 and self._hellos.bit_count() == 1
            return [(padding(HOST_PAYLOAD_BYTES_MAX) if is_padded else b"") + _hello(self.stream)]
        return self.stream.next_output(now_s) if self.is_open else []

    def farewell(self) -> bytes:
        """What to send last."""
        return header(Kind.GONE, self.stream.epoch)

    def next_timer_s(self) -> float | None:
        return self.stream.next_timer_s() if self.is_open else self._hello_at_s

    def on_timer(self, now_s: float) -> None:
        if self.is_open:
            self.stream.on_timer(now_s)
        elif self._hello_at_s is not None and now_s >= self._hello_at_s:
            self._hello_at_s = None
            self._hello_due = True

    def _on_frame(self, frame: Frame, now_s: float) -> None:
        if frame.kind is Kind.HELLO and not self.is_open:
            self.is_open = True
            self.stream.receiving.forget_gaps()
        elif frame.kind is Kind.HELLO:
            return  # the answer to a HELLO that was repeated in vain
        self.stream.on_frame(frame, now_s)


class GuestEnd:
    """The guest's end: answers HELLO, and drops the old epoch when a new one is opened."""

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._replies: dict[int, bytes] = {}
        """To send before anything else, by epoch; bounded: what is read in one go names few epochs."""
        self._hello_due = False
        self.stream: Stream | None = None
        """The epoch in force; None: no host has spoken yet, or the last one took its leave."""

    def feed(self, data: bytes, now_s: float) -> None:
        for frame in self._reader.feed(data):
            self._on_frame(frame, now_s)

    def next_output(self, now_s: float) -> list[Buffer]:
        if self._replies:
            return [self._replies.pop(next(iter(self._replies)))]
        if self.stream is None:
            return []
        if self._hello_due:
            self._hello_due = False
            return [_hello(self.stream)]
        return self.stream.next_output(now_s)

    def close(self) -> None:
        """End the connection from this side."""
        if self.stream is not None:
            self._reply_gone(self.stream.epoch)
            self._drop()

    def next_timer_s(self) -> float | None:
        return self.stream.next_timer_s() if self.stream is not None else None

    def on_timer(self, now_s: float) -> None:
        if self.stream is not None:
            self.stream.on_timer(now_s)

    def _on_frame(self, frame: Frame, now_s: float) -> None:
        if frame.kind is Kind.HELLO:
            if self.stream is None or self.stream.epoch != frame.epoch:
                self._drop()
                self.stream = Stream(frame.epoch, GUEST_PAYLOAD_BYTES_MAX)
            self._hello_due = True
            self.stream.receiving.forget_gaps()
        if self.stream is None or self.stream.epoch != frame.epoch:
            if frame.kind is not Kind.GONE:
                self._reply_gone(frame.epoch)
            return
        self.stream.on_frame(frame, now_s)
        if self.stream.is_gone:
            self._drop()

    def _reply_gone(self, epoch: int) -> None:
        if len(self._replies) < _REPLIES_MAX:
            self._replies[epoch] = header(Kind.GONE, epoch)

    def _drop(self) -> None:
        if self.stream is not None:
            self.stream.is_gone = True
            self.stream = None


_REPLIES_MAX: Final = 8


def _hello(stream: Stream) -> bytes:
    return header(Kind.HELLO, stream.epoch, arrived=stream.receiving.arrived, taken=stream.receiving.taken)
