"""Guest images on disk: one folder per recipe, published whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from sandshift.errors import Damaged, NoRoom, Rejected

DESCRIPTION: Final = "image.json"
KERNEL: Final = "vmlinuz"
INITRAMFS: Final = "initramfs.cpio"
ROOT: Final = "root.erofs"
IMAGES_MAX: Final = 12
"""Kept by `prune`: a sandbox that was started from an older image can move only to a host that still has it."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """image.json. Holds nothing of when and where it was made: the same recipe gives the same bytes."""

    schema: int = 1
    recipe: str
    """SHA-256 of all that went in, hex: the image's id."""
    own_digest: str
    """SHA-256 of our part alone."""
    builder: str
    distribution: str
    """"debian 12"."""
    kernel_release: str
    kernel_command_line: str
    kernel_sha256: str
    initramfs_sha256: str
    root_sha256: str
    root_bytes: int
    python: str
    agent_version: str
    packages: tuple[str, ...]
    """Name and version of every package in it."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    folder: Path
    description: Description

    @property
    def id(self) -> str:
        return self.description.recipe

    @property
    def kernel(self) -> Path:
        return self.folder / KERNEL

    @property
    def initramfs(self) -> Path:
        return self.folder / INITRAMFS

    @property
    def root(self) -> Path:
        return self.folder / ROOT

    @property
    def root_digest(self) -> str:
        """As a disk's `content_digest`: "sha256:..."."""
        return f"sha256:{self.description.root_sha256}"

    @property
    def kernel_command_line(self) -> str:
        return self.description.kernel_command_line

    def verify(self) -> None:
        """Read every file and compare digests. Blocks for about 100 ms per 100 MB.

        Raises:
            Damaged: names the file that is not what image.json says.
        """
        expected = {
            self.kernel: self.description.kernel_sha256,
            self.initramfs: self.description.initramfs_sha256,
            self.root: self.description.root_sha256,
        }
        for path, digest in expected.items():
            if not path.is_file() or file_sha256(path) != digest:
                raise Damaged(
                    f"guest image {path} is not what {DESCRIPTION} says: delete {path.parent}, then build the image again"
                )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def images_folder(cache_dir: Path) -> Path:
    return cache_dir / "images"


def load(folder: Path) -> GuestImage | None:
    """The image in `folder`, if it is whole: described, and every file there in its size."""
    try:
        description = msgspec.json.decode((folder / DESCRIPTION).read_bytes(), type=Description)
        image = GuestImage(folder, description)
        whole = (
            image.root.stat().st_size == description.root_bytes
            and image.kernel.is_file()
            and image.initramfs.is_file()
        )
    except (OSError, msgspec.ValidationError, msgspec.DecodeError):
        return None
    return image if whole else None


def published(cache_dir: Path) -> list[GuestImage]:
    """Every whole image, the latest used first."""
    folders = [
        path for path in images_folder(cache_dir).glob("*") if path.is_dir() and not path.name.startswith(".")
    ]
    images = [image for folder in folders if (image := load(folder)) is not None]
    return sorted(images, key=lambda image: (image.folder / DESCRIPTION).stat().st_mtime, reverse=True)


def mark_used(image: GuestImage) -> None:
    """It counts as the newest from now on. Quietly does nothing where the cache is read-only."""
    with contextlib.suppress(OSError):
        os.utime(image.folder / DESCRIPTION)


def prune(cache_dir: Path, *, count_max: int = IMAGES_MAX) -> list[GuestImage]:
    """Remove the images that were not used for longest, under the builders' lock; what was removed."""
    dropped = published(cache_dir)[count_max:]
    for image in dropped:
        shutil.rmtree(image.folder, ignore_errors=True)
    return dropped


@contextlib.contextmanager
def locked(cache_dir: Path) -> Iterator[None]:
    """Hold the builders' lock; blocks while somebody else builds."""
    folder = images_folder(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Rejected(
            f"guest image: {folder} cannot be written: {error.strerror}; set places.cache_dir"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def workshop(cache_dir: Path) -> Iterator[Path]:
    """A folder to build in, on the file system that the image is published on; gone afterwards."""
    for left in images_folder(cache_dir).glob(".work-*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=".work-", dir=images_folder(cache_dir)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(cache_dir: Path, built: Path, description: Description) -> GuestImage:
    """Move the three files in `built` to their place for good: described, synced, all or nothing."""
    place = images_folder(cache_dir) / description.recipe[:32]
    try:
        (built / DESCRIPTION).write_bytes(
            msgspec.json.format(msgspec.json.encode(description), indent=2) + b"\n"
        )
        for path in sorted(built.iterdir()):
            path.chmod(0o444)
            sync(path)
        sync(built)
        if place.exists():  # not whole, or `load` would have found it
            shutil.rmtree(place)
        built.chmod(0o755)
        built.rename(place)
        sync(place.parent)
    except OSError as error:
        raise NoRoom(f"guest image {place} cannot be written: {error.strerror}") from error
    return GuestImage(place, description)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
