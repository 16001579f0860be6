"""Request and Response around a payload, written by hand for speed. Pure.

The envelopes are ordinary protobuf messages, and reading them is left to protobuf. Writing puts finished pieces side by
side: fields may stand in any order, so a prefix made once per method, the payload and a suffix made once per deadline are
a whole Request without building a message. Tests hold them against protobuf's own encoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from ttrpc.frames import Bytes
from ttrpc.metadata import key_values
from ttrpc.wire.ttrpc_pb2 import Request

TIMEOUT_NANO_MAX: Final = (1 << 63) - 1

_REQUEST_PAYLOAD: Final = b"\x1a"  # field 3, length-delimited
_RESPONSE_PAYLOAD: Final = b"\x12"  # field 2, length-delimited


def varint(number: int) -> bytes:
    """A protobuf varint of a number that is not negative.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_REQUEST_HEADS: Final = tuple(_REQUEST_PAYLOAD + varint(length) for length in range(256))
_RESPONSE_HEADS: Final = tuple(_RESPONSE_PAYLOAD + varint(length) for length in range(256))


def encode_request(prefix: bytes, payload: Bytes, suffix: bytes) -> bytes:
    """A Request: `Method.prefix`, the payload (left out when empty), `request_suffix`."""
    length = len(payload)
    if not length:
        return prefix + suffix
    head = _REQUEST_HEADS[length] if length < 256 else _REQUEST_PAYLOAD + varint(length)
    return b"".join((prefix, head, payload, suffix))


def response_head(length: int) -> bytes:
    """What stands before a payload of this length in a Response without a status; nothing before an empty one."""
    if length < 256:
        return _RESPONSE_HEADS[length] if length else b""
    return _RESPONSE_PAYLOAD + varint(length)


def request_suffix(timeout_s: float | None, metadata: Mapping[str, str | Sequence[str]] | None) -> bytes:
    """Deadline and metadata of a Request."""
    suffix = b"" if timeout_s is None else _timeout(timeout_s)
    if metadata:
        suffix += Request(metadata=key_values(metadata)).SerializeToString()
    return suffix


@lru_cache(maxsize=256)
def _timeout(timeout_s: float) -> bytes:
    # 0 on the wire would be no deadline at all.
    nanoseconds = TIMEOUT_NANO_MAX if timeout_s * 1e9 >= TIMEOUT_NANO_MAX else max(1, int(timeout_s * 1e9))
    return Request(timeout_nano=nanoseconds).SerializeToString()
