"""How the guest is told of a container's files: disks by their places on the one controller, and what comes as bytes.

Made on the host (by what `rootfs/` packs and the shim plugs in), said to the agent by `guest/`. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DiskLayer:
    """A disk by its place on the one controller."""

    lun: int
    file_system: str
    """"erofs" or "ext4"."""


@dataclass(frozen=True, slots=True)
class GuestRootfs:
    """A container's root file system."""

    layers: tuple[DiskLayer, ...] = ()
    """Read-only, the topmost first. Without any the writable disk is the whole root."""
    writable: DiskLayer | None = None
    """Where changes go; None: guest memory."""
    writable_bytes: int = 0
    """Of guest memory that changes may take; 0: half of the guest's."""
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class GuestMount:
    """Something of the host's that a container sees at a place of its own: a small file, or a folder packed as a disk."""

    destination: str
    content: bytes = b""
    mode: int = 0o644
    layer: DiskLayer | None = None
    read_only: bool = False
    layer_path: str = ""
    """Within the layer: the path that is mounted; empty: its root."""
