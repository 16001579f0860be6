"""The one connection between the two hosts, and handing its ends to the shims.

The destination's host listens on its migration address, the source's connects; each end belongs to its host's network
namespace. The coordinator keeps no end: once both shims have theirs it may die.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from typing import Final

from sandshift.errors import Rejected, TimedOut
from sandshift.fleet.host import Host
from sandshift.net.namespace import accept_tcp, connect_tcp, listen_tcp
from sandshift.wire.migration import messages_pb2

CONNECT_S: Final = 10.0
SO_COOKIE: Final = 57
"""Source: asm-generic/socket.h."""
_COOKIE_BYTES: Final = 8
DESCRIPTOR_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Channel:
    """Both ends, in this process's hands."""

    source: socket.socket
    destination: socket.socket

    def close(self) -> None:
        """Let go of both ends. A shim that was handed its end keeps its own copy."""
        self.source.close()
        self.destination.close()


async def make_channel(source: Host, destination: Host) -> Channel:
    """Connect the two hosts.

    A stranger who connects first is turned away: the connection accepted is the one that was made.

    Raises:
        Unavailable: the destination's address is not its own, or there is no route. TimedOut: nobody answers.
    """
    target = destination.migration_address
    try:
        listener = listen_tcp(destination.config.host.network_namespace, target)
    except OSError as error:
        raise Rejected(
            f"host {destination.name}: host.migration_address = {target!r} is no IP address"
        ) from error
    with listener:
        port = listener.getsockname()[1]
        near = await connect_tcp(source.config.host.network_namespace, target, port, timeout_s=CONNECT_S)
        try:
            far = await _accept_from(listener, near.getsockname()[:2])
        except BaseException:
            near.close()
            raise
    return Channel(near, far)


async def _accept_from(listener: socket.socket, caller: tuple[str, int]) -> socket.socket:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + CONNECT_S
    while (left_s := deadline_s - loop.time()) > 0:
        connection = await accept_tcp(listener, timeout_s=left_s)
        if connection.getpeername()[:2] == caller:
            return connection
        connection.close()
    raise TimedOut(f"the connection from {caller[0]} port {caller[1]} did not arrive within {CONNECT_S:g} s")


def describe(end: socket.socket) -> bytes:
    """CreateDuplicateSocket's protocol_info for a socket of this process: a serialized SocketDescriptor."""
    level = socket.SOL_SOCKET
    cookie = end.getsockopt(level, SO_COOKIE, _COOKIE_BYTES)
    return messages_pb2.SocketDescriptor(
        version=DESCRIPTOR_VERSION,
        pid=os.getpid(),
        fd=end.fileno(),
        so_cookie=int.from_bytes(cookie, "little"),
        family=end.getsockopt(level, socket.SO_DOMAIN),
        type=end.getsockopt(level, socket.SO_TYPE),
        protocol=end.getsockopt(level, socket.SO_PROTOCOL),
    ).SerializeToString()
