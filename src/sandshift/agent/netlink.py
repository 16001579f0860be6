"""Setting up network cards over rtnetlink: messages built here, sent by `apply`. No program is started.

Source: Linux rtnetlink(7), include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Final

_RTM_NEWLINK: Final = 16
_RTM_NEWADDR: Final = 20
_RTM_NEWROUTE: Final = 24
_NLM_F_REQUEST: Final = 0x001
_NLM_F_ACK: Final = 0x004
_NLM_F_REPLACE: Final = 0x100
_NLM_F_CREATE: Final = 0x400
_NLMSG_ERROR: Final = 2
_IFF_UP: Final = 1
_IFLA_ADDRESS: Final = 1
_IFLA_MTU: Final = 4
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFA_BROADCAST: Final = 4
_IFA_FLAGS: Final = 8
_IFA_F_NODAD: Final = 0x02
_IFA_F_NOPREFIXROUTE: Final = 0x200
_RTA_DST: Final = 1
_RTA_OIF: Final = 4
_RTA_GATEWAY: Final = 5
_RTA_PREFSRC: Final = 7
_RT_SCOPE_LINK: Final = 253
_RTNH_F_ONLINK: Final = 4
_RT_TABLE_MAIN: Final = 254
_RTPROT_STATIC: Final = 4
_RTN_UNICAST: Final = 1
_HEADER: Final = struct.Struct("=IHHII")
_REPLY_BYTES: Final = 64 << 10
REPLY_S: Final = 5.0


def link(index: int, *, mac: str = "", mtu: int = 0) -> bytes:
    """Bring interface `index` up, with this hardware address and MTU where given."""
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, _IFF_UP, _IFF_UP)
    if mac:
        body += _attribute(_IFLA_ADDRESS, hardware_address(mac))
    if mtu:
        body += _attribute(_IFLA_MTU, struct.pack("=I", mtu))
    return _message(_RTM_NEWLINK, 0, body)


def address(index: int, text: str, *, with_route: bool = True) -> bytes:
    """Give interface `index` an address, "10.9.0.50/24" or "fd00::5/64"; the same one again does no harm.

    Args:
        with_route: with the route to its network that the kernel makes by itself.

    Raises:
        ValueError: it is no address with a prefix length.
    """
    family, packed, prefix = parse_address(text)
    body = struct.pack("=BBBBi", family, prefix, 0, 0, index)
    body += _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
    if family == socket.AF_INET and prefix < 31:
        host_bits = (1 << (32 - prefix)) - 1
        broadcast = int.from_bytes(packed, "big") | host_bits
        body += _attribute(_IFA_BROADCAST, broadcast.to_bytes(4, "big"))
    flags = _IFA_F_NODAD if family == socket.AF_INET6 else 0
    if flags := flags | (0 if with_route else _IFA_F_NOPREFIXROUTE):
        body += _attribute(_IFA_FLAGS, struct.pack("=I", flags))
    return _message(_RTM_NEWADDR, _NLM_F_CREATE | _NLM_F_REPLACE, body)


def default_route(index: int, gateway: str) -> bytes:
    """Send everything else through `gateway` on interface `index`.

    Raises:
        ValueError: `gateway` is no address.
    """
    family, packed = _packed(gateway)
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, 0, _RTN_UNICAST, 0)
    body += _attribute(_RTA_GATEWAY, packed) + _attribute(_RTA_OIF, struct.pack("=i", index))
    return _message(_RTM_NEWROUTE, _NLM_F_CREATE | _NLM_F_REPLACE, body)


def route(
    index: int, destination: str, *, gateway: str = "", source: str = "", on_link: bool = False
) -> bytes:
    """Send what goes to `destination` ("10.0.0.0/8"; "0.0.0.0/0": everything) out of interface `index`.

    Args:
        gateway: through it; empty: `destination` is on the link itself.
        source: the address it is sent from; empty: the kernel chooses.
        on_link: the gateway is on the link, whatever the addresses say.

    Raises:
        ValueError: something is no address.
    """
    family, packed, prefix = parse_address(destination)
    scope = _RT_SCOPE_LINK if family == socket.AF_INET and not gateway else 0
    flags = _RTNH_F_ONLINK if on_link else 0
    body = struct.pack(
        "=BBBBBBBBI", family, prefix, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, scope, _RTN_UNICAST, flags
    )
    if prefix:
        body += _attribute(_RTA_DST, packed)
    if gateway:
        body += _attribute(_RTA_GATEWAY, _packed(gateway)[1])
    if source:
        body += _attribute(_RTA_PREFSRC, _packed(source)[1])
    body += _attribute(_RTA_OIF, struct.pack("=i", index))
    return _message(_RTM_NEWROUTE, _NLM_F_CREATE | _NLM_F_REPLACE, body)


def parse_address(text: str) -> tuple[int, bytes, int]:
    """Family, packed address and prefix length of "10.9.0.50/24"."""
    host, slash, length = text.partition("/")
    family, packed = _packed(host)
    if not slash or not length.isdigit() or int(length) > 8 * len(packed):
        raise ValueError(f"{text!r} is no address with a prefix length, such as 10.9.0.50/24")
    return family, packed, int(length)


def hardware_address(text: str) -> bytes:
    """Six bytes of "52:54:00:12:34:56"."""
    parts = text.split(":")
    try:
        packed = bytes(int(part, 16) for part in parts)
    except ValueError:
        packed = b""
    if len(packed) != 6 or packed[0] & 1:
        raise ValueError(f"{text!r} is no network card's address, such as 52:54:00:12:34:56")
    return packed


def apply(messages: Sequence[bytes]) -> None:
    """Send `messages` one after another, each confirmed by the kernel.

    Raises:
        OSError: the kernel refused one; what came before it holds.
    """
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as kernel:
        kernel.settimeout(REPLY_S)
        for message in messages:
            kernel.send(message)
            reply = kernel.recv(_REPLY_BYTES)
            kind = _HEADER.unpack_from(reply)[1]
            number = struct.unpack_from("=i", reply, _HEADER.size)[0] if kind == _NLMSG_ERROR else 0
            if number:
                raise OSError(-number, f"netlink message {_HEADER.unpack_from(message)[1]} was refused")


def _packed(text: str) -> tuple[int, bytes]:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return family, socket.inet_pton(family, text)
        except OSError:
            continue
    raise ValueError(f"{text!r} is no IP address")


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK | flags, 1, 0) + body
