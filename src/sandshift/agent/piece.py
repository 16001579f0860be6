"""A ReadOutputResponse that is encoded with one copy of its data; protobuf's own way makes four, and most bytes go here."""

from __future__ import annotations


class EncodedPiece:
    """Stands where a server stream yields a ReadOutputResponse with `offset` and `data`."""

    __slots__ = ("_encoded",)

    def __init__(self, offset: int, data: bytes) -> None:
        start = b"\x08" + _varint(offset) if offset else b""
        self._encoded = b"".join((start, b"\x12", _varint(len(data)), data)) if data else start

    def SerializeToString(self) -> bytes:  # noqa: N802  (protobuf's name)
        return self._encoded


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
