"""The machine as the guest sees it: what must be the same on both hosts for memory to mean the same.

QEMU accepts a different CPU, another disk content or an extra device without a word, and the guest then hangs or reads
rubbish (measured). So the shape travels in the saved state and is compared here, before anything moves.
"""

from __future__ import annotations

from dataclasses import dataclass


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
