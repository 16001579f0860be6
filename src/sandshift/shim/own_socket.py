"""A shim's socket in the file system: whose it is, and how the shim takes it away when it ends."""

from __future__ import annotations

import fcntl
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def lock_of(folder: str, name: str) -> int:
    """What whoever binds or withdraws socket `name` holds. Close it."""
    lock = os.open(f"{folder}/.{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        os.close(lock)
        raise
    return lock


def bound(place: str | os.PathLike[str]) -> tuple[int, int]:
    """Which socket is bound there, to tell it from one that takes its place: inode and when it was made. (0, 0): none."""
    try:
        status = os.stat(place)  # noqa: PTH116
    except OSError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns


def withdraw(
    place: str | os.PathLike[str],
    pid_file: str | os.PathLike[str],
    ours: tuple[int, int],
    forget: Callable[[], None] | None = None,
) -> bool:
    """Remove socket and pid file of a shim that ends, and what `forget` removes, while no other can begin.

    False, and nothing is removed, if another shim has taken its place.
    """
    folder, _, name = os.fspath(place).rpartition("/")
    try:
        lock = lock_of(folder, name)
    except FileNotFoundError:
        return True  # Somebody has removed all of it.
    try:
        if bound(place) not in (ours, (0, 0)):
            return False
        if forget is not None:
            forget()
        for path in (place, pid_file):
            try:
                os.unlink(path)  # noqa: PTH108
            except FileNotFoundError:
                continue
        return True
    finally:
        os.close(lock)
