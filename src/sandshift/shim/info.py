"""`-info`: what containerd asks a runtime about itself before it has a container for it."""

from __future__ import annotations

from sandshift import VERSION
from sandshift.shim.by_hand import length_delimited

NAME = b"io.containerd.sandshift.v2"


def runtime_info() -> bytes:
    """containerd.types.RuntimeInfo, by hand so that no protobuf is loaded: name=1, version=2 {version=1}."""
    version = length_delimited(1, VERSION.encode())
    return length_delimited(1, NAME) + length_delimited(2, version)
