"""Writing an initramfs: a cpio archive in the "newc" format, the same bytes for the same entries. Pure.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_TRAILER = "TRAILER!!!"
_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One file, folder or link of the archive. Owned by root, of 1970."""

    path: str
    """Without a leading slash."""
    mode: int
    """Type and permissions, as in st_mode."""
    content: bytes = b""
    """A file's bytes; a symbolic link's target."""


def folder(path: str) -> Entry:
    return Entry(path, stat.S_IFDIR | 0o755)


def executable(path: str, content: bytes) -> Entry:
    return Entry(path, stat.S_IFREG | 0o755, content)


def plain(path: str, content: bytes) -> Entry:
    return Entry(path, stat.S_IFREG | 0o644, content)


def link(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of `entries`, sorted by path, with the folders that they need.

    Raises:
        ValueError: a path twice, or one that starts with a slash.
    """
    chosen: dict[str, Entry] = {}
    for entry in entries:
        if entry.path in chosen:
            raise ValueError(f"{entry.path} is in the archive twice")
        if not entry.path or entry.path.startswith("/"):
            raise ValueError(f"{entry.path!r} is not a relative path")
        chosen[entry.path] = entry
    for path in list(chosen):
        for parent in _parents(path):
            chosen.setdefault(parent, folder(parent))
    written = b"".join(_record(number, chosen[path]) for number, path in enumerate(sorted(chosen), start=1))
    return _padded(written + _record(0, Entry(_TRAILER, 0)), _BLOCK_BYTES)


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: length + 1]) for length in range(len(parts))]


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    fields = (
        inode,
        entry.mode,
        0,  # user
        0,  # group
        2 if stat.S_ISDIR(entry.mode) else 1,
        0,  # modified at, s
        len(entry.content),
        0,  # device, major and minor
        0,
        0,  # the device a node stands for, major and minor
        0,
        len(name),
        0,  # checksum: none in "newc"
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name, 4) + _padded(entry.content, 4)


def _padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)
