"""System calls that Python has no name for: private mounts, a file's time of birth, paths without magic links.

Numbers and layouts: include/uapi/linux/{mount,sched,stat,openat2}.h, x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

CLONE_NEWNS: Final = 0x00020000
MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
_QUIET: Final = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC

_SYS_OPENAT2: Final = 437
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_STATX_BASIC: Final = 0x7FF
_STATX_BTIME: Final = 0x800
_STATX_BYTES: Final = 256
_BTIME_AT: Final = 80

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, subject: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), subject)
    return result


def open_path(path: str, flags: int) -> int:
    """Open `path`, whose last part must be no symbolic link, and which leads through none of /proc's magic links.

    Raises:
        OSError: ELOOP for either; else as open(2).
    """
    how = struct.pack("=QQQ", flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_NO_MAGICLINKS)
    arguments = (ctypes.c_int(_AT_FDCWD), ctypes.c_char_p(os.fsencode(path)), how, ctypes.c_size_t(len(how)))
    return _check(_libc.syscall(_SYS_OPENAT2, *arguments), path)


def born_ns(descriptor: int) -> int | None:
    """When the file was made, ns since the epoch; None: its file system does not know."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    _check(_libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_BASIC | _STATX_BTIME, buffer), str(descriptor))
    (mask,) = struct.unpack_from("=I", buffer)
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _BTIME_AT)
    return int(seconds) * 10**9 + int(nanoseconds) if mask & _STATX_BTIME else None


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    texts = (source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(_libc.mount(*texts), target)


def with_private_mounts(work: Callable[[], T]) -> T:
    """Run `work` in a thread whose mounts nobody else sees, and that are gone with it however it ends. Blocks.

    Programs that `work` starts see them too. Needs CAP_SYS_ADMIN: else OSError EPERM.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _check(_libc.unshare(CLONE_NEWNS), "unshare")
            mount("none", "/", "", MS_REC | MS_PRIVATE)
            answers.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name="private mounts")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return answers[0]


@contextlib.contextmanager
def opened(paths: list[str], open_: Callable[[str, int], int] = open_path) -> Iterator[list[int]]:
    """Folders, for mounting: descriptors of their places."""
    descriptors: list[int] = []
    try:
        for path in paths:
            descriptors.append(open_(path, os.O_PATH | os.O_DIRECTORY))  # noqa: PERF401 - closed on failure
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def show_folder(descriptor: int, place: Path) -> None:
    """Let the folder be seen at `place`, read-only, without what is mounted below it."""
    mount(_link(descriptor), str(place), "", MS_BIND)
    mount("none", str(place), "", MS_BIND | MS_REMOUNT | _QUIET)


def show_merged(descriptors: list[int], place: Path, options: tuple[str, ...]) -> None:
    """Let several folders, the topmost first, be seen at `place` as one, read-only."""
    lower = ":".join(_link(descriptor) for descriptor in descriptors)
    mount("overlay", str(place), "overlay", _QUIET, ",".join((f"lowerdir={lower}", *options)))


def _link(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"
