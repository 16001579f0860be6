"""What a container's mounts become in the guest: which the guest makes itself, and which host path comes in how.

A VM shares no file system with its host. So a bind of a host path is a copy of what is there when the container is made:
a small file as bytes, a folder packed as a read-only disk. What would have to be written back is refused by name. Pure:
what a path is on this host, a `Source`, is looked up by the caller.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sandshift.errors import NotFound, Rejected

FILE_BYTES_MAX: Final = 1 << 20
"""Of a file that is copied in."""
POD_FOLDERS: Final = "/run/sandshift/pod/volumes"
"""Where folders lie in the guest that the pod's containers share and that nothing on the host sees."""
SHM: Final = "/dev/shm"  # noqa: S108  (the name of the mount point)
GUEST_TYPES: Final = frozenset(
    {"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "hugetlbfs", "ramfs"}
)
"""File systems that need nothing of the host."""
POD_FILES: Final = frozenset({"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/termination-log"})
"""Binds of these are copied in even if they may be written: each is one pod's or container's alone. What is written to them
stays in the guest: in particular a termination message does not come back."""
_PER_POD: Final = ("/var/lib/", "/run/", "/var/run/")
"""Where runtimes and kubelets keep them."""
_OF_CRI: Final = re.compile(r"/io\.containerd\.grpc\.v1\.cri/sandboxes/[^/]+/[^/]+$")
"""What containerd's CRI plugin makes for one pod, wherever its `root` and `state` are. Source: seen with 1.6, 1.7 and 2.1."""
_EMPTY_DIR: Final = re.compile(r"/pods/[^/]+/volumes/kubernetes\.io~empty-dir/([^/]+)/*$")
"""Source: Kubernetes pkg/volume/emptydir, GetPath()."""
_BIND_WORDS: Final = frozenset({"bind", "rbind"})
_CARRIED: Final = frozenset(
    {"ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "relatime"}
    | {f"{r}{word}" for r in ("", "r") for word in ("private", "slave", "shared", "unbindable")}
)
"""Options of a bind that mean the same in the guest."""


class Kind(enum.Enum):
    FILE = "a file"
    FOLDER = "a folder"
    OTHER = "neither a file nor a folder"
    MISSING = "not there"


class Source(NamedTuple):
    """What the host has at a bind's source."""

    kind: Kind
    size_bytes: int = 0
    """Of a file."""


class Handling(enum.Enum):
    COPY = "its bytes are copied in"
    PACK = "it is packed as a read-only disk"


@dataclass(frozen=True, slots=True)
class HostBind:
    """A mount of a host path that has to be brought into the guest."""

    source: str
    destination: str
    read_only: bool
    field: str
    """Where it stands in the spec: "mounts[7]"."""

    def handling(self, source: Source) -> Handling:
        """How it comes in.

        Raises:
            NotFound: there is nothing at the source.
            Rejected: it cannot be done in a VM; names the mount and a remedy.
        """
        if source.kind is Kind.MISSING:
            raise NotFound(f"{self}: the host has nothing at {self.source}")
        if source.kind is Kind.OTHER:
            raise Rejected(
                f"{self}: a device, socket or pipe of the host cannot be in a VM: take the mount out, or reach the host"
                " over the network"
            )
        if not self.read_only and not self._is_per_pod(source.kind):
            raise Rejected(
                f"{self}: {source.kind.value} of the host that may be written cannot be in a VM, which has copies only:"
                " mount it read-only, use an emptyDir, or write to the container's own root"
            )
        if source.kind is Kind.FILE and source.size_bytes > FILE_BYTES_MAX:
            raise Rejected(
                f"{self}: a file of {source.size_bytes} bytes is copied in, which is done up to {FILE_BYTES_MAX}: mount"
                " its folder read-only"
            )
        return Handling.COPY if source.kind is Kind.FILE else Handling.PACK

    def _is_per_pod(self, kind: Kind) -> bool:
        is_file = kind is Kind.FILE and self.destination in POD_FILES
        return is_file and _is_one_pods(self.source)

    def __str__(self) -> str:
        return f"{self.field}: {self.source} at {self.destination}"


@dataclass(frozen=True, slots=True)
class SplitMounts:
    stay: tuple[dict[str, Any], ...]
    """The guest's mounts, in order. One whose type is "bind" and whose source is empty gets it from the agent, which has a
    GuestMount of the same destination."""
    binds: tuple[HostBind, ...]
    """To be brought in, in the same order."""


def split_mounts(spec: Mapping[str, Any]) -> SplitMounts:
    """Sort a spec's mounts.

    Raises:
        Rejected: one of them cannot be in a VM, or is no mount; names it.
    """
    listed = spec.get("mounts") or []
    if not isinstance(listed, list):
        raise Rejected(f"mounts: {listed!r:.80} is no list")
    stay: list[dict[str, Any]] = []
    binds: list[HostBind] = []
    for number, mount in enumerate(listed):
        _sort(mount, f"mounts[{number}]", stay, binds)
    return SplitMounts(tuple(stay), tuple(binds))


def _sort(mount: Any, field: str, stay: list[dict[str, Any]], binds: list[HostBind]) -> None:
    if not isinstance(mount, dict) or not _is_place(mount.get("destination")):
        raise Rejected(f"{field}: {mount!r:.120} is no mount with an absolute destination")
    destination, kind, source = mount["destination"], mount.get("type") or "", mount.get("source") or ""
    options = _options(mount.get("options"), field)
    if mount.get("uidMappings") or mount.get("gidMappings"):
        raise Rejected(f"{field}: mappings of ids at {destination} are not supported: mount it without")
    if kind != "bind" and not _BIND_WORDS & set(options):
        if kind not in GUEST_TYPES:
            raise Rejected(
                f"{field}: a file system of type {kind!r} at {destination} cannot be mounted in the VM: mount it on the host"
                " and bind it read-only"
            )
        stay.append(dict(mount))
        return
    if not _is_place(source):
        raise Rejected(f"{field}: the source {source!r} of the bind at {destination} is not absolute")
    if destination.rstrip("/") == SHM and _is_one_pods(source):
        return  # the agent gives the pod's to a container without one
    read_only = "ro" in options
    kept = [word for word in options if word in _CARRIED]
    if found := _EMPTY_DIR.search(source):
        stay.append(_bind(destination, f"{POD_FOLDERS}/{found[1]}", kept))
        return
    stay.append(_bind(destination, "", kept))
    binds.append(HostBind(source, destination, read_only, field))


def _is_one_pods(source: str) -> bool:
    return source.startswith(_PER_POD) or _OF_CRI.search(source) is not None


def _bind(destination: str, source: str, options: Sequence[str]) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", *options]}


def _options(listed: Any, field: str) -> list[str]:
    words = listed or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise Rejected(f"{field}: options {listed!r:.80} are no list of words")
    return words


def _is_place(path: Any) -> bool:
    return isinstance(path, str) and path.startswith("/") and ".." not in path.split("/") and "\0" not in path
