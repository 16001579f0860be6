"""The machine that a sandbox gets: the same devices at the same addresses, for the same wishes, on every host.

QEMU matches devices of an incoming guest by their PCI path, not by their ids, so
addresses are part of the shape and given here, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from sandshift.errors import Rejected
from sandshift.sandbox.shape import Device, MachineShape
from sandshift.vmm.machine import DiskSource, MachineSpec

AGENT_PORT_NAME: Final = "sandshift.agent"
"""How the guest finds the port: /sys/class/virtio-ports/*/name."""

SERIAL_CONTROLLER: Final = Device(id="serial0", driver="virtio-serial-pci", bus="pcie.0", address="0x5")
AGENT_PORT: Final = Device(id="agent", driver="virtserialport", bus="serial0.0", address="1")
DISK_CONTROLLER: Final = Device(id="scsi0", driver="virtio-scsi-pci", bus="pcie.0", address="0x6")

CARDS_MAX: Final = 16
CARD_SLOT_FIRST: Final = 0x8
"""Slots 0x8 to 0x17; 0x1f is the chipset's own."""
DISKS_MAX: Final = 256
"""LUNs of one target that a Linux guest scans without being told to."""
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """A disk to be, before it has a place. `content_digest` is empty for a writable one."""

    size_bytes: int
    content_digest: str = ""
    read_only: bool = True


def disk_device(index: int, plan: DiskPlan) -> Device:
    """The disk in place `index`: LUN `index` of target 0 on the one controller.

    Raises:
        Rejected: there is no such place.
    """
    if not 0 <= index < DISKS_MAX:
        raise Rejected(f"disk {index}: a sandbox has room for {DISKS_MAX} disks")
    return Device(
        id=f"disk{index}",
        driver="scsi-hd",
        bus="scsi0.0",
        address=f"0:0:{index}",
        read_only=plan.read_only,
        size_bytes=plan.size_bytes,
        content_digest=plan.content_digest,
    )


def card_device(index: int, mac: str) -> Device:
    """The network card in place `index`.

    Raises:
        Rejected: there is no such place.
    """
    if not 0 <= index < CARDS_MAX:
        raise Rejected(f"network card {index}: a sandbox has room for {CARDS_MAX} cards")
    return Device(
        id=f"net{index}",
        driver="virtio-net-pci",
        bus="pcie.0",
        address=f"{CARD_SLOT_FIRST + index:#x}",
        mac=mac,
    )


def with_disk(spec: MachineSpec, device: Device, source: DiskSource) -> MachineSpec:
    """The same machine with one more disk."""
    shape = replace(spec.shape, devices=(*spec.shape.devices, device))
    return replace(spec, shape=shape, disks=(*spec.disks, source))


def without_disk(spec: MachineSpec, device_id: str) -> MachineSpec:
    """The same machine without that disk; of one that it does not have, the same."""
    devices = tuple(device for device in spec.shape.devices if device.id != device_id)
    disks = tuple(source for source in spec.disks if source.device_id != device_id)
    return replace(spec, shape=replace(spec.shape, devices=devices), disks=disks)


def standard_shape(
    *,
    machine_type: str,
    accelerator: str,
    cpu_model: str,
    qemu_version: str,
    memory_bytes: int,
    vcpus: int,
    kernel_command_line: str,
    kernel_sha256: str,
    initramfs_sha256: str,
    uuid: str,
    generation_id: str,
    disks: Sequence[DiskPlan] = (),
    macs: Sequence[str] = (),
    cpu_features: Sequence[str] = (),
    shared_memory: bool = False,
) -> MachineShape:
    """The machine of a sandbox: a serial controller with the agent's port, a disk controller, disks, cards.

    Raises:
        Rejected: memory is not whole MiB, or there are more disks or cards than places.
    """
    if memory_bytes <= 0 or memory_bytes % MIB:
        raise Rejected(f"memory of {memory_bytes} bytes: it must be a whole number of MiB")
    if vcpus < 1:
        raise Rejected(f"{vcpus} vCPUs: a machine needs at least one")
    devices = (
        SERIAL_CONTROLLER,
        AGENT_PORT,
        DISK_CONTROLLER,
        *(card_device(index, mac) for index, mac in enumerate(macs)),
        *(disk_device(index, plan) for index, plan in enumerate(disks)),
    )
    return MachineShape(
        machine_type=machine_type,
        accelerator=accelerator,
        cpu_model=cpu_model,
        vcpus=vcpus,
        memory_bytes=memory_bytes,
        devices=devices,
        qemu_version=qemu_version,
        kernel_command_line=kernel_command_line,
        kernel_sha256=kernel_sha256,
        initramfs_sha256=initramfs_sha256,
        uuid=uuid,
        generation_id=generation_id,
        cpu_features=tuple(cpu_features),
        shared_memory=shared_memory,
    )
