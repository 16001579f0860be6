"""The machine as the guest sees it: what must be the same on both hosts for memory to mean the same.

QEMU accepts a different CPU, another disk content or an extra device without a word, and the guest then hangs or reads
rubbish (measured). So the shape travels in the saved state and is compared here, before anything moves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Final


@dataclass(frozen=True, slots=True)
class Device:
    """One device, by what the guest can tell of it. Host paths are not part of it."""

    id: str
    driver: str
    """QEMU's name: "virtio-net-pci", "scsi-hd"."""
    bus: str
    """"pcie.0"; for a disk "scsi0.0"."""
    address: str
    """"0x6"; for a disk its "channel:target:lun"."""
    read_only: bool = False
    size_bytes: int = 0
    content_digest: str = ""
    """"sha256:..." of a read-only disk's content."""
    mac: str = ""


@dataclass(frozen=True, slots=True)
class MachineShape:
    machine_type: str
    """Versioned: "pc-q35-10.0", never an alias."""
    accelerator: str
    """"tcg" or "kvm"."""
    cpu_model: str
    vcpus: int
    memory_bytes: int
    devices: tuple[Device, ...]
    qemu_version: str
    kernel_command_line: str
    kernel_sha256: str
    initramfs_sha256: str
    uuid: str
    generation_id: str
    cpu_features: tuple[str, ...] = ()
    """Features the guest was given, for a comparison with what the destination can give."""
    shared_memory: bool = False
    """Guest memory is a memfd, so that it can be hashed from outside."""


DISK_DRIVERS: Final = frozenset({"scsi-hd", "scsi-cd", "virtio-blk-pci"})
CARD_DRIVERS: Final = frozenset({"virtio-net-pci"})
_VERSION: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


def is_disk(device: Device) -> bool:
    return device.driver in DISK_DRIVERS


def is_card(device: Device) -> bool:
    return device.driver in CARD_DRIVERS


def version_of(text: str) -> tuple[int, int, int] | None:
    """QEMU's version as numbers, from "10.0.2" or "10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)"; None if there is none."""
    found = _VERSION.match(text.strip())
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def differences(one: MachineShape, other: MachineShape) -> list[str]:
    """What two machines differ in, as far as the guest can tell; empty: memory of one means the same in the other.

    The QEMU version is not the guest's to see, and the generation id changes on purpose: neither is compared.
    """
    names = [
        f.name for f in fields(MachineShape) if f.name not in {"devices", "qemu_version", "generation_id"}
    ]
    found = [
        f"{name} is {getattr(one, name)!r} and {getattr(other, name)!r}"
        for name in names
        if getattr(one, name) != getattr(other, name)
    ]
    ours, theirs = ({device.id: device for device in shape.devices} for shape in (one, other))
    for device_id in sorted(ours.keys() | theirs.keys()):
        found += _device_differences(device_id, ours.get(device_id), theirs.get(device_id))
    return found


def _device_differences(device_id: str, one: Device | None, other: Device | None) -> list[str]:
    if one is None or other is None:
        return [f"device {device_id} is in one of them only"]
    return [
        f"device {device_id}: {f.name} is {getattr(one, f.name)!r} and {getattr(other, f.name)!r}"
        for f in fields(Device)
        if getattr(one, f.name) != getattr(other, f.name)
    ]
