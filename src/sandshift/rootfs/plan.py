"""What a container's root file system becomes: files that are plugged into its sandbox's VM as disks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.errors import Rejected

EROFS: Final = "erofs"
EXT4: Final = "ext4"
WRITABLE_ANNOTATION: Final = "io.sandshift.rootfs.writable"
"""Of a container: where its changes go, "memory" (the guest's, the default) or "disk" (a scratch disk)."""
SECTOR_BYTES: Final = 512
"""A disk is a whole number of these."""


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A file of this host that becomes a disk."""

    path: Path
    file_system: str
    """EROFS or EXT4."""
    size_bytes: int
    digest: str
    """"sha256:..." of its content; empty if it is writable."""
    read_only: bool
    scratch: bool = False
    """Made for one container alone and removed with it, by who takes the disk out."""


@dataclass(frozen=True, slots=True)
class RootfsPlan:
    """The disks of one container's root file system."""

    layers: tuple[DiskFile, ...]
    """Read-only, the topmost first. Without any the writable disk is the whole root."""
    writable: DiskFile | None = None
    """Where changes go; None: guest memory."""
    read_only: bool = False
    """The snapshotter gave it without a place for changes."""

    @property
    def disks(self) -> tuple[DiskFile, ...]:
        return (*self.layers, self.writable) if self.writable is not None else self.layers


def wants_scratch(annotations: Mapping[str, str]) -> bool:
    """Whether a container's changes shall go to a scratch disk.

    Raises:
        Rejected: the annotation is neither "disk" nor "memory".
    """
    said = annotations.get(WRITABLE_ANNOTATION, "memory")
    if said not in ("disk", "memory"):
        raise Rejected(
            f'annotation {WRITABLE_ANNOTATION} = {said!r}: it must be "memory" (the default) or "disk"'
        )
    return said == "disk"
