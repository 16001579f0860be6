"""The channel while a VM process uses it: made ready for QEMU, and ended for the peer if ours fails.

Whoever holds a duplicate of a socket keeps it open. A VM process that dies or fails in the middle closes only its own, so
the peer would wait for ever: the connection of a transfer that failed is ended, which acts on every holder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from pathlib import Path
from typing import Final

SOCKADDR_BYTES: Final = 16
UNSPECIFIED_ADDRESS: Final = bytes(SOCKADDR_BYTES)
"""A struct sockaddr of family AF_UNSPEC."""

_connect = ctypes.CDLL(None, use_errno=True).connect


class Channel:
    """A duplicate of the caller's socket.

    Sets what duplicates share: TCP_NODELAY, because Nagle costs 40 ms of blackout (measured), and whether it blocks.
    """

    def __init__(self, channel_fd: int) -> None:
        self._socket = socket.socket(fileno=os.dup(channel_fd))
        if self._socket.family in (socket.AF_INET, socket.AF_INET6):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def never_block(self) -> None:
        """To be called when QEMU has the socket and does not use it yet.

        QEMU makes each descriptor that it is handed blocking, and makes the TLS handshake in its main loop: without this
        its QMP and the guest's devices stand still until the peer answers (measured with 10.0).
        """
        self._socket.setblocking(False)  # noqa: FBT003

    def copies_in(self, pid: int) -> int:
        """How often process `pid` has the socket open. Looks at /proc: a fraction of a millisecond."""
        ours = f"socket:[{os.fstat(self._socket.fileno()).st_ino}]"
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            return sum(_link(entry.path) == ours for entry in entries)
        return 0

    def shut_down(self) -> None:
        """End the connection for every holder of it."""
        end_connection(self._socket)

    def close(self) -> None:
        """Close our duplicate. Idempotent."""
        self._socket.close()


def end_connection(connection: socket.socket) -> None:
    """End a connection at once, for every holder of either end. Never fails.

    A shutdown alone leaves a peer that writes waiting for ever, once the buffers are full: on TCP it takes a reset, which
    connecting to nowhere sends. Source: connect(2), "AF_UNSPEC"; Linux net/ipv4/tcp.c, tcp_disconnect().
    """
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        _connect(connection.fileno(), UNSPECIFIED_ADDRESS, SOCKADDR_BYTES)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
