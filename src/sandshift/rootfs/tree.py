"""A digest of a folder's whole content: the same for the same files wherever they lie, whenever they were written.

Modification times are left out, as packing leaves them out. A second digest, of what the file system says of each file,
tells whether anything was changed meanwhile. All of it blocks; the folder is walked, links are never followed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from typing import Final

from sandshift.errors import NoRoom

ENTRIES_MAX: Final = 2_000_000
"""Files and folders of one root file system."""
TREE_BYTES_MAX: Final = 64 << 30
_READ_BYTES: Final = 1 << 18
_NO_XATTRS: Final = (errno.ENOTSUP, errno.ENODATA)


@dataclass(frozen=True, slots=True)
class Tree:
    digest: str
    """Of the content, hex."""
    fingerprint: str
    """Of inodes and times, hex: another one means that somebody wrote meanwhile."""
    entries: int
    size_bytes: int


class _Walk:
    def __init__(self, *, contents: bool) -> None:
        self.contents = contents
        self.content = hashlib.sha256()
        self.inodes = hashlib.sha256()
        self.entries = 0
        self.size_bytes = 0
        self._linked: dict[tuple[int, int], bytes] = {}

    def folder(self, path: bytes) -> None:
        """Each folder before what is in it, names in order. As deep as paths may be, so without recursion."""
        waiting = [(path, b"")]
        while waiting:
            at, name = waiting.pop()
            status = os.lstat(at)
            self.entry(at, name, status)
            if stat.S_ISDIR(status.st_mode):
                names = sorted(os.listdir(at), reverse=True)  # noqa: PTH208 - bytes
                waiting += [(at + b"/" + inner, name + b"/" + inner) for inner in names]

    def entry(self, path: bytes, name: bytes, status: os.stat_result) -> None:
        self.entries += 1
        if self.entries > ENTRIES_MAX:
            raise NoRoom(f"root file system: more than {ENTRIES_MAX} files and folders")
        times = (status.st_mtime_ns, status.st_ctime_ns)
        self.inodes.update(repr((name, status.st_dev, status.st_ino, status.st_size, *times)).encode())
        if self.contents:
            self._note(path, name, status)

    def _note(self, path: bytes, name: bytes, status: os.stat_result) -> None:
        mode = status.st_mode
        facts: list[object] = [name, mode, status.st_uid, status.st_gid, _xattrs(path)]
        if stat.S_ISREG(mode):
            first = self._linked.setdefault((status.st_dev, status.st_ino), name)
            facts.append(first if first != name else self._file(path, status.st_size))
            if status.st_nlink == 1:
                del self._linked[status.st_dev, status.st_ino]
        elif stat.S_ISLNK(mode):
            facts.append(os.readlink(path))  # noqa: PTH115 - bytes
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            facts.append(status.st_rdev)
        self.content.update(repr(facts).encode())

    def _file(self, path: bytes, size_bytes: int) -> str:
        self.size_bytes += size_bytes
        if self.size_bytes > TREE_BYTES_MAX:
            raise NoRoom(f"root file system: more than {TREE_BYTES_MAX} bytes")
        digest = hashlib.sha256()
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while data := os.read(descriptor, _READ_BYTES):
                digest.update(data)
        finally:
            os.close(descriptor)
        return digest.hexdigest()


def digest_of(folder: str) -> Tree:
    """Raises OSError for what cannot be read, NoRoom for more than a root file system may have."""
    walk = _Walk(contents=True)
    walk.folder(os.fsencode(folder))
    return Tree(walk.content.hexdigest(), walk.inodes.hexdigest(), walk.entries, walk.size_bytes)


def fingerprint_of(folder: str) -> str:
    """The second digest alone, without a look into the files."""
    walk = _Walk(contents=False)
    walk.folder(os.fsencode(folder))
    return walk.inodes.hexdigest()


def _xattrs(path: bytes) -> list[tuple[str, bytes]]:
    try:
        return sorted(
            (name, os.getxattr(path, name, follow_symlinks=False))
            for name in os.listxattr(path, follow_symlinks=False)
        )
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return []
        raise
