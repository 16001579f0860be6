"""SocketDescriptor: which of its caller's file descriptors is the channel.

On Windows the field `protocol_info` holds a WSAPROTOCOL_INFO. Here it holds a message that names a file descriptor of
the caller, of which the shim takes a copy, and what the caller says that it is. The copy is taken only if what the
kernel says of it is the same (docs/reference/socket-descriptor.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from sandshift.errors import IllegalMove, Rejected
from sandshift.wire.migration import messages_pb2

VERSION: Final = 1
DESCRIPTOR_BYTES_MAX: Final = 128
"""Seven numbers; a WSAPROTOCOL_INFO has 628 bytes and more."""
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
SOCK_STREAM: Final = 1
FAMILIES: Final = {AF_UNIX: "AF_UNIX", AF_INET: "AF_INET", AF_INET6: "AF_INET6"}
"""Numbers of Linux on every architecture that we run on. Source: include/linux/socket.h."""
ROOT_UID: Final = 0


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What the caller says of its socket."""

    pid: int
    fd: int
    cookie: int
    family: int
    type: int
    protocol: int


@dataclass(frozen=True, slots=True)
class SocketFacts:
    """What the kernel says of the copy."""

    cookie: int
    """SO_COOKIE."""
    family: int
    """SO_DOMAIN."""
    type: int
    """SO_TYPE."""
    protocol: int
    """SO_PROTOCOL."""
    connected: bool
    """It has a peer (getpeername)."""


def parse(protocol_info: bytes, *, caller_pid: int | None, caller_uid: int | None) -> Descriptor:
    """Read and check a descriptor, before anything is copied.

    Args:
        protocol_info: as it came.
        caller_pid, caller_uid: SO_PEERCRED of the connection that the call came on; None if it is not known.

    Raises:
        Rejected: it is no SocketDescriptor, describes no stream socket that can carry memory, or names another
            process than the caller and the caller is not root.
    """
    message = _message(protocol_info)
    if message.version != VERSION:
        raise Rejected(f"protocol_info: version = {message.version} is not {VERSION}")
    if message.pid <= 0 or message.fd < 0:
        raise Rejected(f"protocol_info: pid = {message.pid}, fd = {message.fd} name no file descriptor")
    if message.so_cookie == 0:
        raise Rejected("protocol_info: so_cookie = 0 is no socket's: read SO_COOKIE of the socket")
    if message.family not in FAMILIES:
        raise Rejected(f"protocol_info: family = {message.family} is not one of {_families()}")
    if message.type != SOCK_STREAM:
        raise Rejected(f"protocol_info: type = {message.type} is not SOCK_STREAM ({SOCK_STREAM})")
    if caller_uid != ROOT_UID and message.pid != caller_pid:
        called = "unknown" if caller_pid is None else str(caller_pid)
        raise Rejected(
            f"protocol_info: pid = {message.pid} is not the caller's own ({called}): only root may hand over another "
            "process's socket"
        )
    return Descriptor(
        pid=message.pid,
        fd=message.fd,
        cookie=message.so_cookie,
        family=message.family,
        type=message.type,
        protocol=message.protocol,
    )


def check(descriptor: Descriptor, facts: SocketFacts) -> None:
    """Hold the copy against its description. The session is unharmed by a refusal: the caller may try again.

    Raises:
        Rejected: the copy is another socket than the one described; names what differs, both values.
        IllegalMove: it is not connected.
    """
    differences = [
        f"{name} is {found}, described as {said}"
        for name, found, said in (
            ("so_cookie", facts.cookie, descriptor.cookie),
            ("family", facts.family, descriptor.family),
            ("type", facts.type, descriptor.type),
            ("protocol", facts.protocol, descriptor.protocol),
        )
        if found != said
    ]
    where = f"protocol_info: file descriptor {descriptor.fd} of process {descriptor.pid}"
    if differences:
        raise Rejected(f"{where} is not the socket described: " + "; ".join(differences))
    if not facts.connected:
        raise IllegalMove(f"{where} is not connected: connect it to the other host first")


def _message(protocol_info: bytes) -> messages_pb2.SocketDescriptor:
    if not protocol_info:
        raise Rejected("protocol_info is empty: give a serialized SocketDescriptor")
    if len(protocol_info) > DESCRIPTOR_BYTES_MAX:
        raise Rejected(
            f"protocol_info has {len(protocol_info)} bytes and a SocketDescriptor at most {DESCRIPTOR_BYTES_MAX}: "
            "this is a Linux host, which takes no WSAPROTOCOL_INFO"
        )
    try:
        return messages_pb2.SocketDescriptor.FromString(protocol_info)
    except DecodeError as error:
        raise Rejected(f"protocol_info: these {len(protocol_info)} bytes are no SocketDescriptor") from error


def _families() -> str:
    return ", ".join(f"{name} ({number})" for number, name in FAMILIES.items())
