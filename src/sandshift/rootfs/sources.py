"""Sources of a root file system on this host: opened once, checked to be what they should, and told from all others.

A committed snapshot of overlayfs never changes, and its folder is not used again for another: so device, inode, time of
birth and times of change of the layers' folders stand for their content, and what was packed once is found in
microseconds. Everything else is told by a digest of its content.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Final

from sandshift.errors import NotFound, Rejected, Unavailable
from sandshift.rootfs import erofs, kernel
from sandshift.rootfs.mounts import Folders
from sandshift.rootfs.plan import EROFS, EXT4, SECTOR_BYTES

_MAGIC: Final = {EROFS: (1024, b"\xe2\xe1\xf5\xe0"), EXT4: (1024 + 0x38, b"\x53\xef")}
"""Offset and bytes. Source: fs/erofs/erofs_fs.h, fs/ext4/ext4.h."""
_READ_BYTES: Final = 1 << 20
_UPPER_XATTRS: Final = ("trusted.overlay.", "user.overlay.")
"""What overlayfs notes on the folder of changes for itself."""


def key_of_content(digest: str) -> str:
    """The index key of a tree's digest, for the program that packs here."""
    return _key("tree", digest)


def key_of_layers(recipe: Folders) -> str | None:
    """The index key of committed layers with no changes on top; None: only a look at the content can tell.

    Raises what `open_source` does.
    """
    if not recipe.upper:
        return None
    with _folder(recipe.upper) as upper:
        if os.listdir(upper):  # noqa: PTH208 - of a descriptor
            return None
        top = _top(upper)
    layers = []
    for path in recipe.lower:
        with _folder(path) as layer:
            if (identity := identity_of(layer)) is None:
                return None
            layers.append(identity)
    return _key("layers", [layers, top, list(recipe.options)])


def key_of_file(descriptor: int) -> str | None:
    """The index key of a file that nobody writes any more; None if its file system does not say enough."""
    identity = identity_of(descriptor)
    return None if identity is None else _key("file", identity)


def identity_of(descriptor: int) -> list[int] | None:
    """What tells an unchanged file or folder from every other on this host, one in the same inode later included."""
    born = kernel.born_ns(descriptor)
    if born is None:
        return None
    status, file_system = os.fstat(descriptor), os.fstatvfs(descriptor)
    times = [born, status.st_mtime_ns, status.st_ctime_ns]
    return [status.st_dev, file_system.f_fsid, status.st_ino, status.st_size, status.st_mode, *times]


def _top(descriptor: int) -> list[object]:
    """What the root of the merged tree has of the folder of changes."""
    status = os.fstat(descriptor)
    names = sorted(name for name in os.listxattr(descriptor) if not name.startswith(_UPPER_XATTRS))
    return [
        status.st_mode,
        status.st_uid,
        status.st_gid,
        [[name, os.getxattr(descriptor, name).hex()] for name in names],
    ]


def _key(kind: str, what: Sequence[object] | str) -> str:
    return hashlib.sha256(json.dumps([kind, erofs.packer_identity(), what]).encode()).hexdigest()


@contextlib.contextmanager
def _folder(path: str) -> Iterator[int]:
    """A folder, open for reading."""
    descriptor = open_source(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_source(path: str, flags: int) -> int:
    """Open a path that a snapshotter named.

    Raises:
        NotFound: nothing is there. Rejected: it is a link, or leads through one of /proc's. Unavailable: it cannot be read.
    """
    try:
        return kernel.open_path(path, flags)
    except FileNotFoundError as error:
        raise NotFound(f"rootfs: {path} is not there: the snapshot may be gone") from error
    except NotADirectoryError as error:
        raise Rejected(f"rootfs: {path} is no folder, or a link: give the folder itself") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Rejected(
                f"rootfs: {path} is a link, or leads through one of /proc's: give the file itself"
            ) from error
        raise Unavailable(f"rootfs: {path} cannot be read: {error.strerror}") from error


def check_file(descriptor: int, path: str, file_system: str) -> int:
    """The size of a file that is to be a disk, bytes.

    Raises:
        Rejected: it is none, of a size that no disk has, or holds another file system.
    """
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        raise Rejected(
            f"rootfs: {path} is a block device, which is not handed on: "
            "use one of the snapshotters overlayfs, native, blockfile or erofs"
        )
    if not stat.S_ISREG(status.st_mode):
        raise Rejected(f"rootfs: {path} is no file")
    if status.st_size == 0 or status.st_size % SECTOR_BYTES:
        raise Rejected(f"rootfs: {path} has {status.st_size} bytes: a disk is a multiple of {SECTOR_BYTES}")
    offset, magic = _MAGIC[file_system]
    if os.pread(descriptor, len(magic), offset) != magic:
        raise Rejected(f"rootfs: {path} holds no {file_system} file system, as its mount says")
    return status.st_size


def content_of(descriptor: int) -> str:
    """ "sha256:..." of a file. Blocks: about 1 s per GB."""
    digest = hashlib.sha256()
    offset = 0
    while data := os.pread(descriptor, _READ_BYTES, offset):
        digest.update(data)
        offset += len(data)
    return f"sha256:{digest.hexdigest()}"
