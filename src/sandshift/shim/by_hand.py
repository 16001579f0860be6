"""A few protobuf messages read and written by hand, for the commands that must answer before protobuf could be loaded."""

from __future__ import annotations


def protobuf_strings(data: bytes) -> dict[int, bytes]:
    """The length-delimited top-level fields of a protobuf message, first of each; empty if it is not one."""
    fields: dict[int, bytes] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    try:
        while at < len(data):
            key = varint()
            match key & 7:
                case 0:
                    varint()
                case 1:
                    at += 8
                case 2:
                    size = varint()
                    if at + size > len(data):
                        return {}
                    fields.setdefault(key >> 3, data[at : at + size])
                    at += size
                case 5:
                    at += 4
                case _:
                    return {}
    except IndexError:
        return {}
    return fields


def length_delimited(number: int, data: bytes) -> bytes:
    """One length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes((value & 0x7F | 0x80,))
        value >>= 7
    return out + bytes((value,))
