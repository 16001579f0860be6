"""`-info`: what containerd asks a runtime about itself before it has a container for it."""

from __future__ import annotations

from sandshift import VERSION
from sandshift.shim.by_hand import length_delimited

NAME = b"io.containerd.sandshift.v2"
MOUNTS_KEY = b"containerd.io/runtime-allow-mounts"
MOUNTS = b"erofs,ext4,format/*,mkdir/*,overlay"
"""What containerd 2.2 and newer hand over as it is, so that layers that are files become disks without being mounted on the
host. All of them or none: with a part of the list containerd mounts the whole (seen with 2.2.7 and 2.3.4)."""


def runtime_info() -> bytes:
    """containerd.types.RuntimeInfo, by hand so that no protobuf is loaded: name=1, version=2 {version=1},
    annotations=5 {key=1, value=2}."""
    version = length_delimited(1, VERSION.encode())
    mounts = length_delimited(1, MOUNTS_KEY) + length_delimited(2, MOUNTS)
    return length_delimited(1, NAME) + length_delimited(2, version) + length_delimited(5, mounts)
