"""What stands in the way of moving a sandbox: everything at once, each with its remedy. Looks only; changes nothing.

QEMU accepts a different CPU, another disk or an extra device without a word, and the guest hangs or reads rubbish
afterwards (measured), so all of it is compared here, before anything moves. `source_blockers` knows what the source can
know, `destination_blockers` what only the destination does. Options that disagree: session/options.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from sandshift.errors import Blocker
from sandshift.sandbox.model import MIGRATION_ANNOTATION, Container, Sandbox
from sandshift.sandbox.shape import Device, MachineShape, is_card, is_disk, version_of

TCG_VERSION_MIN: Final = (9, 0, 0)
"""QEMU before 9.0 under TCG loses guest writes during a live migration, status `completed` (measured with 7.2.22)."""
MOVABLE_DRIVERS: Final = frozenset(
    {
        "virtio-net-pci",
        "virtio-serial-pci",
        "virtserialport",
        "virtio-scsi-pci",
        "scsi-hd",
        "scsi-cd",
        "virtio-blk-pci",
        "virtio-rng-pci",
        "virtio-balloon-pci",
        "pcie-root-port",
        "vmgenid",
        "isa-serial",
    }
)
"""Devices whose whole state QEMU sends."""
UNMOVABLE_DRIVERS: Final[Mapping[str, str]] = {
    "vfio-pci": "it is a piece of the source host's hardware",
    "usb-host": "it is a piece of the source host's hardware",
    "virtio-9p-pci": "its state lies in the source host's files",
    "vhost-user-fs-pci": "its state lies in the source host's files",
    "vhost-vsock-pci": "its connections end with the host",
    "ivshmem-plain": "its memory is the source host's",
    "nvdimm": "its content is not part of the guest's memory",
}
UNNAMED_CPUS: Final = frozenset({"host", "max", "best", "base"})
"""Models that mean something else on every host or in every QEMU."""
VM_OVERHEAD_BYTES: Final = 96 << 20
"""What QEMU itself takes beside the guest's memory: 60 to 90 MB resident (measured)."""
STREAMS_BYTES_MAX: Final = 40 * 1024
"""What the handover record has for stream offsets, of its 48 KiB."""
STREAMS_PER_PROCESS: Final = 3
STREAM_OVERHEAD_BYTES: Final = 20
"""Offset, stream number and their tags, beside the process id."""
SKEW_S_MAX: Final = 1.0
CARRIED_S_MAX: Final = 60.0
"""How long a saved state may be on its way before its age says anything about clocks."""
_NEVER: Final = (0, 0, 0)
_VERSIONED: Final = re.compile(r"-\d+\.\d+$")


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What this host has for a disk of the shape."""

    size_bytes: int
    content_digest: str = ""
    """"sha256:..."; empty: not known."""


@dataclass(frozen=True, slots=True)
class DestinationFacts:
    """What a host can do. None and empty texts mean "not known": then nothing is held against it."""

    qemu_version: str
    accelerator: str
    """What a VM on this host would run on: "tcg" or "kvm"."""
    machine_types: frozenset[str]
    cpu_models: frozenset[str] | None = None
    cpu_features: frozenset[str] | None = None
    """What the guest's CPU model could be given here."""
    drivers: frozenset[str] | None = None
    """Devices that this QEMU has."""
    memory_free_bytes: int | None = None
    kernel_sha256: str = ""
    initramfs_sha256: str = ""
    disks: Mapping[str, DiskFacts] | None = None
    """By device id; a disk of the shape that is not here is missing."""
    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What this host's network gives to a card, by card id; a card that is not here keeps its own."""
    now_us: int = 0
    """This host's clock."""


def source_blockers(sandbox: Sandbox, shape: MachineShape, *, mirrors_disks: bool = False) -> list[Blocker]:
    """What of the sandbox itself cannot move, whatever the destination is. `mirrors_disks`: writable disks are copied."""
    found = [*_annotation(sandbox), *_unfit_qemu(shape.qemu_version, shape.accelerator, "the source's")]
    if not _VERSIONED.search(shape.machine_type):
        found.append(
            Blocker(
                "machine.type",
                f"{shape.machine_type} is an alias, which means another machine in every QEMU",
                "start the sandbox with a versioned type, such as pc-q35-10.0",
            )
        )
    if shape.accelerator == "kvm" and shape.cpu_model in UNNAMED_CPUS:
        found.append(
            Blocker(
                "machine.cpu",
                f"model {shape.cpu_model} is whatever the source host has",
                "start the sandbox with a named model in vm.cpu_model, one that both hosts have",
            )
        )
    scratch = {} if mirrors_disks else {one.writable: one for one in sandbox.containers if one.writable}
    found += [_scratch_disk(one) for one in scratch.values()]
    for device in shape.devices:
        if device.id not in scratch:
            found += _unmovable(device, mirrors_disks=mirrors_disks)
    found += [_unstarted(one) for one in sandbox.containers if not one.started]
    return sorted([*found, *_too_many_streams(sandbox)])


def destination_blockers(sandbox: Sandbox, shape: MachineShape, facts: DestinationFacts) -> list[Blocker]:
    """What this host lacks, or has otherwise, for a sandbox that comes from elsewhere."""
    return sorted(
        [
            *_unfit_qemu(facts.qemu_version, shape.accelerator, "this host's"),
            *_machine(shape, facts),
            *_cpu(shape, facts),
            *_memory(shape, facts),
            *_image(shape, facts),
            *_devices(shape, facts),
            *_addresses(sandbox, facts),
        ]
    )


def clock_warnings(exported_at_us: int, facts: DestinationFacts) -> list[str]:
    """Whether the hosts' clocks differ, as far as a saved state that was carried for some time can tell."""
    if not exported_at_us or not facts.now_us:
        return []
    ahead_s = (facts.now_us - exported_at_us) / 1e6
    if -SKEW_S_MAX <= ahead_s <= CARRIED_S_MAX + SKEW_S_MAX:
        return []
    if ahead_s < 0:
        return [f"this host's clock is at least {-ahead_s:.1f} s behind the source's: set both by NTP"]
    return [
        (
            f"the saved state is {ahead_s:.0f} s old by this host's clock: it was carried for long, or the hosts' clocks "
            "differ; set both by NTP"
        )
    ]


def _annotation(sandbox: Sandbox) -> Iterator[Blocker]:
    if (said := sandbox.may_migrate) is True:
        return
    value = sandbox.annotations[MIGRATION_ANNOTATION]
    problem = f"annotation {MIGRATION_ANNOTATION} is {value!r}"
    if said is None:
        problem += ", which is neither true nor false"
    yield Blocker("sandbox.annotations", problem, "create the sandbox without it, or with true")


def _unfit_qemu(version: str, accelerator: str, whose: str) -> Iterator[Blocker]:
    if accelerator == "tcg" and (version_of(version) or _NEVER) < TCG_VERSION_MIN:
        yield Blocker(
            "qemu.version",
            f"{whose} QEMU {version} loses guest writes in a live migration under TCG",
            "install QEMU 9.0 or newer there (Debian 12: from bookworm-backports), or use KVM",
        )


def _scratch_disk(container: Container) -> Blocker:
    return Blocker(
        f"container.{container.container_id}",
        f"its changes are on a writable disk ({container.writable}), whose content does not move",
        "keep them in the guest's memory: create the container without annotation io.sandshift.rootfs.writable, from a "
        "snapshotter that gives read-only layers",
    )


def _unstarted(container: Container) -> Blocker:
    return Blocker(
        f"container.{container.container_id}",
        "it was created and not started, and a Task.Start at the destination starts nothing",
        "start or delete it, then migrate",
    )


def _unmovable(device: Device, *, mirrors_disks: bool) -> Iterator[Blocker]:
    if device.driver not in MOVABLE_DRIVERS:
        why = UNMOVABLE_DRIVERS.get(device.driver, "nobody has shown that QEMU sends all of its state")
        yield Blocker(
            f"device.{device.id}",
            f"{device.driver} cannot move: {why}",
            "run the sandbox without this device",
        )
    if is_disk(device) and not device.read_only and not mirrors_disks:
        yield Blocker(
            f"device.{device.id}",
            "it is a writable disk, whose content does not move",
            "keep what is written in the guest's memory (the default), or take the disk out",
        )
    if is_disk(device) and device.read_only and not device.content_digest:
        yield Blocker(
            f"device.{device.id}",
            "the content of this read-only disk has no digest to hold the destination's against",
            "start the sandbox anew: digests are taken at its start",
        )
    if is_card(device) and not device.mac:
        yield Blocker(
            f"device.{device.id}", "the card has no MAC of its own", "start the sandbox anew with one"
        )


def _too_many_streams(sandbox: Sandbox) -> Iterator[Blocker]:
    processes = [*sandbox.processes, *(process for one in sandbox.containers for process in one.processes)]
    size_bytes = sum(
        STREAMS_PER_PROCESS * (len(process.process_id.encode()) + STREAM_OVERHEAD_BYTES)
        for process in processes
    )
    if size_bytes > STREAMS_BYTES_MAX:
        yield Blocker(
            "sandbox.processes",
            f"the streams of {len(processes)} processes need {size_bytes} bytes in the handover, which has "
            f"{STREAMS_BYTES_MAX}",
            "end or forget some of them",
        )


def _machine(shape: MachineShape, facts: DestinationFacts) -> Iterator[Blocker]:
    if facts.accelerator != shape.accelerator:
        yield Blocker(
            "machine.accelerator",
            f"the guest runs on {shape.accelerator}, this host would run it on {facts.accelerator}",
            f"set vm.accelerator = {shape.accelerator!r} on this host if it can do that, else choose another host",
        )
    if shape.machine_type not in facts.machine_types:
        yield Blocker(
            "machine.type",
            f"QEMU {facts.qemu_version} has no {shape.machine_type}",
            f"install QEMU {_version_behind(shape)} or newer on this host, or choose another",
        )


def _version_behind(shape: MachineShape) -> str:
    return shape.machine_type.rpartition("-")[2] or shape.qemu_version


def _cpu(shape: MachineShape, facts: DestinationFacts) -> Iterator[Blocker]:
    if facts.cpu_models is not None and shape.cpu_model not in facts.cpu_models:
        yield Blocker(
            "machine.cpu",
            f"QEMU {facts.qemu_version} on this host has no model {shape.cpu_model}",
            "choose another host, or start the sandbox with a model that both have",
        )
    if facts.cpu_features is not None and shape.cpu_features:
        if missing := sorted(set(shape.cpu_features) - facts.cpu_features):
            yield Blocker(
                "machine.cpu",
                f"the guest has CPU features that this host cannot give: {', '.join(missing)}",
                "choose another host, or start the sandbox with a CPU model without them",
            )
    elif shape.cpu_model in UNNAMED_CPUS and _release(shape.qemu_version) != _release(facts.qemu_version):
        yield Blocker(
            "machine.cpu",
            f"model {shape.cpu_model} may be another in QEMU {facts.qemu_version} than in the source's "
            f"{shape.qemu_version}",
            "install the same release of QEMU on both hosts, or start the sandbox with a named CPU model",
        )


def _release(version: str) -> tuple[int, int]:
    major, minor, _ = version_of(version) or _NEVER
    return major, minor


def _memory(shape: MachineShape, facts: DestinationFacts) -> Iterator[Blocker]:
    free, needed = facts.memory_free_bytes, shape.memory_bytes + VM_OVERHEAD_BYTES
    if free is not None and free < needed:
        yield Blocker(
            "host.memory",
            f"the VM needs {_mib(needed)} MiB and this host has {_mib(free)} MiB free",
            "free memory on this host, or choose another",
        )


def _image(shape: MachineShape, facts: DestinationFacts) -> Iterator[Blocker]:
    for name in ("kernel_sha256", "initramfs_sha256"):
        there, here = getattr(shape, name), getattr(facts, name)
        if here and there != here:
            yield Blocker(
                f"image.{name.removesuffix('_sha256')}",
                f"the guest was booted from {_short(there)}, this host has {_short(here)}: it could not reboot",
                "build or copy the same guest image to this host",
            )


def _devices(shape: MachineShape, facts: DestinationFacts) -> Iterator[Blocker]:
    for device in shape.devices:
        if facts.drivers is not None and device.driver not in facts.drivers:
            yield Blocker(
                f"device.{device.id}",
                f"QEMU {facts.qemu_version} on this host has no {device.driver}",
                "install QEMU's device modules on this host, or choose another",
            )
        if facts.disks is not None and is_disk(device) and device.read_only:
            yield from _disk(device, facts.disks.get(device.id))


def _disk(device: Device, here: DiskFacts | None) -> Iterator[Blocker]:
    subject, remedy = f"device.{device.id}", "bring the same content to this host (the same image or layer)"
    if here is None:
        yield Blocker(subject, f"this host has no disk with content {_short(device.content_digest)}", remedy)
    elif here.content_digest and here.content_digest != device.content_digest:
        yield Blocker(
            subject,
            f"its content is {_short(device.content_digest)} on the source and {_short(here.content_digest)} here",
            remedy,
        )
    elif here.size_bytes != device.size_bytes:
        yield Blocker(
            subject, f"it has {device.size_bytes} bytes on the source and {here.size_bytes} here", remedy
        )


def _addresses(sandbox: Sandbox, facts: DestinationFacts) -> Iterator[Blocker]:
    for card in sandbox.network_cards:
        here = facts.addresses.get(card.id)
        if here is not None and card.addresses and sorted(here) != sorted(card.addresses):
            yield Blocker(
                f"network.{card.id}",
                f"the guest has {', '.join(sorted(card.addresses))}, this host's network gives "
                f"{', '.join(sorted(here)) or 'nothing'}",
                "reserve the guest's addresses for it in this host's network, or its connections break",
            )


def _short(digest: str) -> str:
    """A digest as it is told apart by eye."""
    return digest.removeprefix("sha256:")[:12] or "nothing"


def _mib(size_bytes: int) -> int:
    return size_bytes >> 20
