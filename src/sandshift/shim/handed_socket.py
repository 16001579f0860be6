"""Taking a copy of a caller's socket: pidfd_open and pidfd_getfd, then looking hard at what came.

Whether it may be taken is decided in `session/descriptor.py`; here is only what the kernel says.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from typing import Final

from sandshift.errors import Rejected, Unavailable
from sandshift.session.descriptor import SocketFacts

SYS_PIDFD_GETFD: Final = 438
SO_COOKIE: Final = 57
_libc = ctypes.CDLL(None, use_errno=True)


def copy_descriptor(pid: int, descriptor: int) -> int:
    """A duplicate of file descriptor `descriptor` of process `pid`, close-on-exec.

    Raises Rejected if there is no such process or descriptor, Unavailable if the kernel refuses.
    """
    try:
        process = os.pidfd_open(pid)
    except OSError as error:
        raise Rejected(
            f"protocol_info: pid = {pid} is not a process of this host ({error.strerror})"
        ) from error
    try:
        copy: int = _libc.syscall(SYS_PIDFD_GETFD, process, descriptor, 0)
        if copy < 0:
            number = ctypes.get_errno()
            if number == errno.EBADF:
                raise Rejected(f"protocol_info: fd = {descriptor} is not open in process {pid}")
            raise Unavailable(f"the socket of process {pid} could not be copied: {os.strerror(number)}")
        os.set_inheritable(copy, False)  # noqa: FBT003 - its only form
        return copy
    finally:
        os.close(process)


def facts_of(copy: int) -> SocketFacts:
    """Raises Rejected if it is not a socket at all."""
    try:
        held = socket.socket(fileno=copy)
    except OSError as error:
        if error.errno == errno.ENOTSOCK:
            raise Rejected("protocol_info: fd is not a socket") from error
        raise Unavailable(f"the handed socket cannot be looked at: {error.strerror}") from error
    try:
        return _facts(held)
    except OSError as error:
        raise Unavailable(f"the handed socket cannot be looked at: {error.strerror}") from error
    finally:
        held.detach()  # `copy` is the caller's.


def _facts(held: socket.socket) -> SocketFacts:
    return SocketFacts(
        cookie=int.from_bytes(held.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little"),
        family=held.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN),
        type=held.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
        protocol=held.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL),
        connected=_is_connected(held),
    )


def _is_connected(held: socket.socket) -> bool:
    try:
        held.getpeername()
    except OSError:
        return False
    return True


def close_quietly(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
