"""What a shim is made of: the real parts, or those that a simulation brings and that pass the same suites."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sandshift.shim.haste import NoHaste

if TYPE_CHECKING:
    from sandshift.guest.client import Guest
    from sandshift.image.store import GuestImage
    from sandshift.rootfs.plan import DiskFile, RootfsPlan
    from sandshift.sandbox.model import NetworkCard, Sandbox
    from sandshift.sandbox.patching import Mount
    from sandshift.sandbox.preflight import DestinationFacts
    from sandshift.sandbox.shape import MachineShape
    from sandshift.shim.haste import Haste
    from sandshift.vmm.machine import Vmm


@dataclass(frozen=True, slots=True)
class Wish:
    """What a sandbox's caller asked for; zero and empty mean the host's configuration."""

    memory_bytes: int = 0
    vcpus: int = 0
    cold: bool = False
    nameservers: tuple[str, ...] = ()
    network_namespace: str = ""
    """File of the namespace in which the pod's network is made already (CNI); empty: the host's own network."""


@dataclass(frozen=True, slots=True)
class PodShare:
    """What all containers of the pod share, for the agent. Set before the first container is made."""

    hosts: bytes = b""
    """/etc/hosts; empty: the guest's."""
    resolv_conf: bytes = b""
    shm_bytes: int = 0
    """Of /dev/shm; 0: the agent's default."""
    sysctls: Mapping[str, str] = field(default_factory=dict)

    def as_document(self) -> dict[str, object]:
        """For the sandbox's file on disk."""
        return {
            "hosts": self.hosts.hex(),
            "resolv_conf": self.resolv_conf.hex(),
            "shm_bytes": self.shm_bytes,
            "sysctls": dict(self.sysctls),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> PodShare:
        """What `as_document` made. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            hosts=bytes.fromhex(document["hosts"]),
            resolv_conf=bytes.fromhex(document["resolv_conf"]),
            shm_bytes=int(document["shm_bytes"]),
            sysctls=dict(document["sysctls"]),
        )


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What on this host a VM boots from."""

    kernel: Path
    initramfs: Path
    root: Path
    image: GuestImage


class Taps(Protocol):
    """Makes and removes sandboxes' taps: in this process's network namespace, or in a pod's (the file's path)."""

    async def pod_cards(self, sandbox_id: str, network_namespace: str) -> tuple[NetworkCard, ...]:
        """A card for each interface of a pod's network, with its MAC, addresses and routes."""
        ...

    async def attach(
        self, sandbox_id: str, cards: tuple[NetworkCard, ...], network_namespace: str = ""
    ) -> dict[str, str]:
        """Card's device id -> name of the tap made for it. All or nothing.

        In a pod's network namespace the n-th card is connected with the n-th interface.
        """
        ...

    async def detach(self, taps: list[str], network_namespace: str = "") -> None:
        """Remove them; those that are gone already are no error."""
        ...


class Machines(Protocol):
    """Describes the VMs of this host."""

    async def shape_for(self, wish: Wish, model: Sandbox) -> tuple[MachineShape, BootFiles]:
        """The machine of a fresh sandbox.

        Raises NotFound if there is no guest image, and says how to make one; Rejected for a wish that cannot be.
        """
        ...

    async def files_for(self, shape: MachineShape) -> BootFiles:
        """What a machine that comes from elsewhere needs here. Raises NotFound if this host lacks that image."""
        ...

    async def template_for(self, shape: MachineShape, files: BootFiles) -> Path:
        """A template that a machine of this shape can start from, made if there is none yet."""
        ...

    def template_is_bad(self, shape: MachineShape, files: BootFiles) -> None:
        """A machine could not be loaded from the template: the next one makes it anew."""
        ...

    async def facts(self, shape: MachineShape) -> DestinationFacts:
        """What this host can do for a machine of this shape."""
        ...


class Packer(Protocol):
    """Makes disks of what a snapshotter hands over."""

    async def plan(
        self, mounts: Sequence[Mount], bundle: Path, *, scratch_file: Path | None = None
    ) -> RootfsPlan:
        """The disks of a container's root file system; `scratch_file`: made as a disk for its changes."""
        ...

    async def pack_folder(self, path: Path) -> DiskFile:
        """A folder of this host as a read-only disk."""
        ...


def host_clock_us() -> int:
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class Parts:
    vmm: Vmm
    taps: Taps
    machines: Machines
    connect_guest: Callable[[Path, float], Awaitable[Guest]]
    """The agent's client on a VM's agent socket, with the bound of a reply in seconds."""
    clock_us: Callable[[], int] = host_clock_us
    """This host's wall clock, microseconds since the epoch: the one that QEMU's stamps are of."""
    arrival_pause_s: float = 0.5
    """How long a guest that has moved is left to its own work before its agent is asked anything: all of its code is cold,
    and its clients wait (their longest silence 363 ms in place of 566, measured with 0.8 s)."""
    packer: Packer | None = None
    """None: a shim that can have no containers."""
    haste: Haste = field(default_factory=NoHaste)
    """For the time of a transfer."""


class LateParts:
    """Parts that are loaded when one of them is first needed: a shim's first answers need none."""

    clock_us = staticmethod(host_clock_us)

    def __init__(self, load: Callable[[], Parts]) -> None:
        self._load = load
        self._parts: Parts | None = None

    def __getattr__(self, name: str) -> object:
        if self._parts is None:
            self._parts = self._load()
        return getattr(self._parts, name)
