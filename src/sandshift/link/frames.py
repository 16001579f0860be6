"""Frames of the link: how they look, and how a reader finds its way back after lost or torn bytes. Pure.

A frame is a header of 52 bytes and a payload. Integers are big-endian:

    offset  size  field
    0       4     magic, F5 53 4C 1A
    4       1     kind: 1 HELLO, 2 DATA, 3 ACK, 4 RESEND, 5 GONE
    5       3     zero
    8       8     epoch: one connection of one host process; random
    16      8     offset of the payload in the sender's stream; 0 without a payload
    24      8     arrived: up to where the other stream has arrived at the sender
    32      8     taken: up to where the sender's user has read it
    40      4     payload length
    44      4     CRC-32 of the payload
    48      4     CRC-32 of bytes 0 to 47

virtio-serial never reorders bytes and never repeats them, but a migration or an unclean disconnect may swallow a range.
So after a bad header or payload the reader looks for the next magic. A torn frame claims up to PAYLOAD_BYTES_MAX bytes of
what comes after it: who resends therefore pads first (`padding`), and the reader finds the frames in what was claimed.
"""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass
from typing import Final

MAGIC: Final = b"\xf5\x53\x4c\x1a"
PAYLOAD_BYTES_MAX: Final = 256 << 10
"""What a reader accepts. A sender may keep to less: the padding before a resend is as long as its longest frame."""
_HEADER: Final = struct.Struct(">4sB3xQQQQII")
_SUM_BYTES: Final = 4
HEADER_BYTES: Final = _HEADER.size + _SUM_BYTES


class Kind(enum.IntEnum):
    HELLO = 1
    """Host: opens the epoch, or goes on with it after its wire was cut. Guest: the answer."""
    DATA = 2
    ACK = 3
    RESEND = 4
    """Bytes from `arrived` on are missing."""
    GONE = 5
    """This epoch is over at the sender, or was never known there."""


_KINDS: Final = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    epoch: int
    offset: int = 0
    arrived: int = 0
    taken: int = 0
    payload: bytes = b""

    def encode(self) -> bytes:
        start = header(
            self.kind,
            self.epoch,
            offset=self.offset,
            arrived=self.arrived,
            taken=self.taken,
            payload_bytes=len(self.payload),
            payload_crc=zlib.crc32(self.payload),
        )
        return start + self.payload


def header(
    kind: Kind,
    epoch: int,
    *,
    offset: int = 0,
    arrived: int = 0,
    taken: int = 0,
    payload_bytes: int = 0,
    payload_crc: int = 0,
) -> bytes:
    """A frame's header, for payloads that are written from several buffers."""
    packed = _HEADER.pack(MAGIC, kind, epoch, offset, arrived, taken, payload_bytes, payload_crc)
    return packed + zlib.crc32(packed).to_bytes(_SUM_BYTES, "big")


def padding(payload_bytes_max: int) -> bytes:
    """Zeros that complete whatever frame of a sender with this bound may be torn at the reader."""
    return bytes(HEADER_BYTES + payload_bytes_max)


class FrameReader:
    """Finds frames in bytes that come in any pieces. Holds less than one frame beyond what was fed last."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._awaited_bytes = HEADER_BYTES
        """With less than this no whole frame can be held: no need to look."""
        self.skipped_bytes = 0
        """Bytes that belonged to no good frame, all told."""

    @property
    def held_bytes(self) -> int:
        return len(self._held)

    def feed(self, data: bytes) -> list[Frame]:
        """Take `data` in; every frame that is whole by now."""
        self._held += data
        frames: list[Frame] = []
        place = 0
        while len(self._held) - place >= self._awaited_bytes:
            frame, place = self._frame_at(place)
            if frame is not None:
                frames.append(frame)
        del self._held[:place]
        return frames

    def _frame_at(self, place: int) -> tuple[Frame | None, int]:
        """The frame that starts at `place`, if one does, and where to look next."""
        self._awaited_bytes = HEADER_BYTES
        start = memoryview(self._held)[place : place + HEADER_BYTES]
        magic, number, epoch, offset, arrived, taken, length, payload_crc = _HEADER.unpack(
            start[: _HEADER.size]
        )
        good = magic == MAGIC and zlib.crc32(start[: _HEADER.size]) == int.from_bytes(
            start[_HEADER.size :], "big"
        )
        start.release()
        kind = _KINDS.get(number)
        if not good or kind is None or length > PAYLOAD_BYTES_MAX:
            return None, self._skip(place)
        end = place + HEADER_BYTES + length
        if len(self._held) < end:
            self._awaited_bytes = end - place
            return None, place
        with memoryview(self._held) as view:
            payload = bytes(view[place + HEADER_BYTES : end])
        if zlib.crc32(payload) != payload_crc:
            return None, self._skip(place)
        return Frame(kind, epoch, offset, arrived, taken, payload), end

    def _skip(self, place: int) -> int:
        """Where the next magic is after `place`, or may begin."""
        found = self._held.find(MAGIC, place + 1)
        target = found if found >= 0 else max(place + 1, len(self._held) - len(MAGIC) + 1)
        self.skipped_bytes += target - place
        return target
