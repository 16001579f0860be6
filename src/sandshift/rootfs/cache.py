"""Packed root file systems on disk: one file per content, shared by all sandboxes of the host, bounded.

CACHE_DIR/rootfs/
    images/SHA256.erofs   read-only, appears whole or not at all; its modification time says when it was last asked for
    index/KEY             what a source was packed into; a key names one content, and is forgotten with its image
    digests/KEY           the digest of a file that is used as it is
    locks/NN              whoever packs holds the lock of what is packed
    place/                an empty folder: what is packed is mounted on it, in the packer's own mount namespace

Calls block. Several shims share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.errors import NoRoom

IMAGES_MAX: Final = 256
IMAGES_BYTES_MAX: Final = 20 << 30
INDEX_MAX: Final = 4096
"""Entries of the index, the newest kept."""
KEPT_S: Final = 1200.0
"""An image that was asked for so lately is kept: it may be on its way into a VM, which an import waits for 600 s."""
_LOCKS: Final = 64
_FLOCK: Final = struct.Struct("@hhqqi4x")
"""struct flock: type, whence, start, length, pid. Source: fcntl.h, x86-64."""


@dataclass(frozen=True, slots=True)
class CachedImage:
    path: Path
    size_bytes: int
    used_at_s: float
    """Since the epoch."""

    @property
    def digest(self) -> str:
        return f"sha256:{self.path.stem}"


def over_limits(
    images: Sequence[CachedImage], *, now_s: float, count_max: int, bytes_max: int
) -> list[CachedImage]:
    """Which images may go, the longest unasked first, so that the rest keeps both limits if it can. Pure."""
    kept_bytes, kept, dropped = 0, 0, []
    for image in sorted(images, key=lambda one: one.used_at_s, reverse=True):
        fits = kept < count_max and kept_bytes + image.size_bytes <= bytes_max
        if fits or now_s - image.used_at_s < KEPT_S:
            kept_bytes, kept = kept_bytes + image.size_bytes, kept + 1
        else:
            dropped.append(image)
    return list(reversed(dropped))


class ImageCache:
    def __init__(
        self, cache_dir: Path, *, count_max: int = IMAGES_MAX, bytes_max: int = IMAGES_BYTES_MAX
    ) -> None:
        self._folder = cache_dir / "rootfs"
        self._count_max = count_max
        self._bytes_max = bytes_max

    def place(self) -> Path:
        return self._made("place")

    def find(self, key: str) -> CachedImage | None:
        """What the source of that key was packed into, marked as asked for now; None: it was not, or is gone."""
        try:
            digest, size = (self._folder / "index" / key).read_text().split()
            path = self._folder / "images" / f"{digest}.erofs"
            if path.stat().st_size != int(size):
                return None
            os.utime(path)
        except (OSError, ValueError):
            return None
        return CachedImage(path, int(size), time.time())

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """One at a time on this host, per key. Blocks; ends with the process that holds it."""
        stripe = int(hashlib.sha256(key.encode()).hexdigest(), 16) % _LOCKS
        with (self._made("locks") / f"{stripe:02}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def new_file(self) -> Iterator[Path]:
        """A file to pack into, gone afterwards unless it was published."""
        folder = self._made("images")
        descriptor, name = tempfile.mkstemp(prefix=".packing-", dir=folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(descriptor)
            Path(name).unlink(missing_ok=True)

    def publish(self, packed: Path) -> CachedImage:
        """Make the file part of the cache, on disk when this returns. A content that is there already stays as it is."""
        size_bytes = packed.stat().st_size
        with packed.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        path = self._folder / "images" / f"{digest}.erofs"
        if path.exists() and path.stat().st_size == size_bytes:
            os.utime(path)
        else:
            packed.chmod(0o400)
            packed.replace(path)
            _sync(path.parent)
        return CachedImage(path, size_bytes, time.time())

    def note(self, key: str, image: CachedImage) -> None:
        """The source of that key gives `image`. A crash forgets it: then it is packed again."""
        _replace(self._made("index"), key, f"{image.path.stem} {image.size_bytes}\n")

    def known_digest(self, key: str) -> str | None:
        """What `note_digest` was told."""
        path = self._folder / "digests" / key
        try:
            digest = path.read_text()
            os.utime(path)
        except OSError:
            return None
        return digest if digest.startswith("sha256:") else None

    def note_digest(self, key: str, digest: str) -> None:
        folder = self._made("digests")
        _replace(folder, key, digest)
        _keep_newest(folder, INDEX_MAX)

    def all(self) -> list[CachedImage]:
        found = []
        for path in (self._folder / "images").glob("[0-9a-f]*.erofs"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append(CachedImage(path, status.st_size, status.st_mtime))
        return found

    def prune(self) -> list[CachedImage]:
        """Remove what is above the limits and in no VM, and what dead packers left; the images removed."""
        dropped = []
        limits = {"count_max": self._count_max, "bytes_max": self._bytes_max}
        for image in over_limits(self.all(), now_s=time.time(), **limits):
            if not is_in_use(image.path):
                image.path.unlink(missing_ok=True)
                dropped.append(image)
        for left in (self._folder / "images").glob(".packing-*"):
            _remove_if_left(left)
        self._prune_index()
        return dropped

    def _prune_index(self) -> None:
        there = {image.path.stem for image in self.all()}
        for path in (self._folder / "index").glob("[0-9a-f]*"):
            with contextlib.suppress(OSError):
                if path.read_text().split(" ")[0] not in there:
                    path.unlink()
        _keep_newest(self._folder / "index", INDEX_MAX)

    def _made(self, name: str) -> Path:
        folder = self._folder / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder


def is_in_use(path: Path) -> bool:
    """Whether a VM has the file as a disk: QEMU holds locks on its images for as long as it lives (locking=auto)."""
    try:
        with path.open("rb") as file:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
    except FileNotFoundError:
        return False
    return bool(kind != fcntl.F_UNLCK)


def require_space(folder: Path, size_bytes: int) -> None:
    """Raises NoRoom if `folder` has not so many bytes left, and some."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < size_bytes + (size_bytes >> 4):
        raise NoRoom(
            f"{folder} has {free >> 20} MiB left and a root file system of {size_bytes >> 20} MiB is to be packed: free space"
        )


def _replace(folder: Path, name: str, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=folder)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(temporary).replace(folder / name)


def _keep_newest(folder: Path, count_max: int) -> None:
    entries = []
    for path in folder.glob("[0-9a-f]*"):
        with contextlib.suppress(OSError):
            entries.append((path.stat().st_mtime, path))
    for _, path in sorted(entries, reverse=True)[count_max:]:
        path.unlink(missing_ok=True)


def _remove_if_left(path: Path) -> None:
    """A packer holds the lock of its file: one that can be had is nobody's."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
