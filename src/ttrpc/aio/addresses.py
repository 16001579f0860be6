"""Addresses: "/path", "unix:///path", and "\\0name" or "unix://@name" for Linux' abstract sockets."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Final

PATH_BYTES_MAX: Final = 107
"""sun_path is 108 bytes with its final zero."""
BACKLOG: Final = 128


def socket_path(address: str | os.PathLike[str]) -> str:
    """What to bind or connect to.

    Raises:
        ValueError: another scheme, an empty address, or more than `PATH_BYTES_MAX` bytes.
    """
    text = os.fspath(address)
    if text.startswith("unix:"):
        text = text.removeprefix("unix:")
        text = text.removeprefix("//")
    elif "://" in text:
        raise ValueError(f"address {text!r}: only Unix sockets have addresses here; connect others yourself")
    if text.startswith("@"):
        text = "\0" + text[1:]
    if not text.strip("\0"):
        raise ValueError("the address of the socket is empty")
    if len(os.fsencode(text)) > PATH_BYTES_MAX:
        raise ValueError(
            f"socket path {text!r} is longer than the {PATH_BYTES_MAX} bytes that the kernel takes"
        )
    return text


def listen(address: str | os.PathLike[str], *, mode: int = 0o600, backlog: int = BACKLOG) -> socket.socket:
    """A listening Unix socket. A socket file that nobody listens on any more is replaced.

    The file has `mode` from its first moment. The caller removes it in the end; abstract sockets have no file.

    Raises:
        ValueError: see `socket_path`.
        OSError: EADDRINUSE when somebody listens there or the file is not a socket, and whatever bind(2) says.
    """
    path = socket_path(address)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.startswith("\0"):
            listening.bind(path)
        else:
            _remove_dead(path)
            # The mode of a socket file comes from its inode's, less the umask.
            os.fchmod(listening.fileno(), mode)
            listening.bind(path)
            os.chmod(path, mode)  # noqa: PTH101
        listening.listen(backlog)
        listening.setblocking(False)  # noqa: FBT003
    except BaseException:
        listening.close()
        raise
    return listening


def _remove_dead(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116
            raise OSError(errno.EADDRINUSE, "the path is in use, and not by a socket", path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # noqa: PTH108
            return
    raise OSError(errno.EADDRINUSE, "somebody listens there already", path)
