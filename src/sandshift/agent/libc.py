"""Calls of the kernel that Python 3.11 has no names for. Each blocks no longer than the kernel does."""

from __future__ import annotations

import ctypes
import os
from typing import Final

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
_MS_REMOUNT: Final = 32
MNT_DETACH: Final = 2
CLONE_NEWPID: Final = 0x20000000
IN_MODIFY: Final = 2
_IN_NONBLOCK_CLOEXEC: Final = os.O_NONBLOCK | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError that names the target."""
    _check(
        _libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode() or None), target
    )


def remount(target: str, flags: int, options: str) -> None:
    """mount(2) with MS_REMOUNT: other flags and options for what is mounted."""
    mount("none", target, "none", flags | _MS_REMOUNT, options)


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2). Raises OSError that names the target."""
    _check(_libc.umount2(target.encode(), flags), target)


def new_pid_namespace() -> None:
    """unshare(CLONE_NEWPID): the next child is process 1 of a namespace of its own."""
    _check(_libc.unshare(CLONE_NEWPID), "a process namespace")


def children_in(descriptor: int) -> None:
    """setns(2): children are made in this process namespace from now on."""
    _check(_libc.setns(descriptor, CLONE_NEWPID), "a process namespace")


def inotify() -> int:
    """A non-blocking inotify(7) descriptor."""
    return _check(_libc.inotify_init1(_IN_NONBLOCK_CLOEXEC), "inotify")


def watch(descriptor: int, path: str, mask: int) -> int:
    """inotify_add_watch(2): the watch's number."""
    return _check(_libc.inotify_add_watch(descriptor, path.encode(), mask), path)


def _check(result: int, name: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result
