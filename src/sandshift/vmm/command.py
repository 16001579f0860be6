"""QEMU's command line from a MachineSpec. Pure: opens nothing, looks at nothing.

What the guest can see comes from the shape alone, so that both hosts build the same machine. Everything that is given to
QEMU as JSON needs no quoting; the few options that are not JSON take file descriptors or paths with doubled commas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.errors import Rejected
from sandshift.sandbox.shape import Device, MachineShape
from sandshift.vmm.hypervisor import TCG_FEATURES_OFF
from sandshift.vmm.machine import MachineSpec
from sandshift.vmm.standard import AGENT_PORT_NAME

KIB: Final = 1 << 10
TRANSLATION_BUFFER_MIB: Final = 256
"""Bound of TCG's cache of translated code. QEMU's own bound is 1 GiB per VM, more than most guests."""
SERIAL_PORTS_MAX: Final = 4

MACHINE_OPTIONS: Final = "usb=off,sata=off,smbus=off,vmport=off,hpet=off,i8042=off"
"""What a sandbox has no use for: without it the guest boots faster. The guest can tell, so a change here is a change of
the machine: two hosts must agree (QEMU refuses an incoming guest whose devices it does not have)."""

RAM_ID: Final = "pc.ram"
"""QEMU's own name for it, so that a guest saved without a memfd can be loaded with one."""

CONSOLE_FILE: Final = "console"


@dataclass(frozen=True, slots=True)
class Sockets:
    """Listening Unix sockets that the VM process inherits, by descriptor number."""

    qmp_fd: int
    agent_fd: int


def command_line(
    spec: MachineSpec, *, binary: str, sockets: Sockets, data_dirs: Sequence[str] = (), incoming: bool = False
) -> list[str]:
    """All arguments of the VM process, the program's name first.

    Args:
        spec: the machine and this host's places for it.
        binary: QEMU.
        sockets: see Sockets.
        data_dirs: extra -L directories of a QEMU that is not installed.
        incoming: wait for a guest from elsewhere instead of a boot.

    Raises:
        Rejected: the shape names a device that we do not know, or the spec has no place for one.
    """
    shape = spec.shape
    return [
        binary,
        *(part for folder in data_dirs for part in ("-L", folder)),
        *("-name", f"guest={_escaped(spec.name)}"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *_machine(shape),
        *("-kernel", str(spec.kernel), "-initrd", str(spec.initramfs), "-append", shape.kernel_command_line),
        # Every way in which the guest ends ends the process: one thing to watch.
        *("-action", "reboot=shutdown,shutdown=poweroff,panic=shutdown"),
        *(
            "-chardev",
            f"socket,id=qmp,fd={sockets.qmp_fd},server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
        ),
        *("-chardev", f"socket,id=agent,fd={sockets.agent_fd},server=on,wait=off"),
        *("-chardev", f"file,id=console,path={_escaped(str(spec.run_dir / CONSOLE_FILE))},append=on"),
        *("-serial", "chardev:console"),
        *_generation(shape),
        *(part for device in shape.devices for part in _device(device, spec)),
        "-S",  # Virtual CPUs start through Machine.run_vcpus and in no other way.
        *(("-incoming", "defer") if incoming else ()),
    ]


def drive(device: Device, path: Path) -> dict[str, object]:
    """The block node of a disk. Image locks stay on: two VMs that write one image are refused by QEMU itself."""
    return {
        "driver": "raw",
        "node-name": node_name(device.id),
        "read-only": device.read_only,
        "file": {"driver": "file", "filename": str(path), "read-only": device.read_only},
    }


def node_name(device_id: str) -> str:
    return f"{device_id}-node"


def disk_options(device: Device) -> dict[str, object]:
    """A disk as -device and device_add take it.

    Raises:
        Rejected: its address is not "channel:target:lun".
    """
    try:
        channel, target, lun = (int(part) for part in device.address.split(":"))
    except ValueError:
        raise Rejected(f"disk {device.id}: address {device.address!r} is not channel:target:lun") from None
    return {
        "driver": device.driver,
        "id": device.id,
        "bus": device.bus,
        "channel": channel,
        "scsi-id": target,
        "lun": lun,
        "drive": node_name(device.id),
    }


def _machine(shape: MachineShape) -> list[str]:
    memory_kib = shape.memory_bytes // KIB
    backend = f",memory-backend={RAM_ID}" if shape.shared_memory else ""
    arguments = ["-machine", f"{shape.machine_type},{MACHINE_OPTIONS}{backend}"]
    model = shape.cpu_model
    if shape.accelerator == "tcg":
        arguments += ["-accel", f"tcg,thread=multi,tb-size={TRANSLATION_BUFFER_MIB}"]
        model = ",".join((model, *(f"{feature}=off" for feature in TCG_FEATURES_OFF)))
    elif shape.accelerator == "kvm":
        arguments += ["-accel", "kvm"]
    else:
        raise Rejected(f"accelerator {shape.accelerator!r}: it must be tcg or kvm")
    arguments += ["-cpu", model, "-smp", f"cpus={shape.vcpus}", "-m", f"{memory_kib}k"]
    arguments += ["-uuid", shape.uuid]
    if shape.shared_memory:
        memory = {"qom-type": "memory-backend-memfd", "id": RAM_ID, "size": shape.memory_bytes, "share": True}
        arguments += ["-object", json.dumps(memory)]
    return arguments


def _generation(shape: MachineShape) -> list[str]:
    if not shape.generation_id:
        return []
    return ["-device", json.dumps({"driver": "vmgenid", "id": "vmgenid", "guid": shape.generation_id})]


def _device(device: Device, spec: MachineSpec) -> list[str]:
    try:
        build = _BUILDERS[device.driver]
    except KeyError:
        raise Rejected(f"device {device.id}: {device.driver} is not a device that sandboxes have") from None
    return build(device, spec)


def _serial_controller(device: Device, spec: MachineSpec) -> list[str]:
    del spec
    return ["-device", json.dumps({**_on_pci(device), "max_ports": SERIAL_PORTS_MAX})]


def _serial_port(device: Device, spec: MachineSpec) -> list[str]:
    del spec
    options = {"driver": device.driver, "id": device.id, "bus": device.bus, "nr": int(device.address)}
    return ["-device", json.dumps({**options, "chardev": "agent", "name": AGENT_PORT_NAME})]


def _disk_controller(device: Device, spec: MachineSpec) -> list[str]:
    del spec
    return ["-device", json.dumps(_on_pci(device))]


def _disk(device: Device, spec: MachineSpec) -> list[str]:
    paths = [source.path for source in spec.disks if source.device_id == device.id]
    if len(paths) != 1:
        raise Rejected(f"disk {device.id}: {len(paths)} paths are given for it on this host, it needs one")
    return ["-blockdev", json.dumps(drive(device, paths[0])), "-device", json.dumps(disk_options(device))]


def _card(device: Device, spec: MachineSpec) -> list[str]:
    if device.id not in spec.taps:
        raise Rejected(f"network card {device.id}: no tap is given for it on this host")
    options: dict[str, object] = {**_on_pci(device), "mac": device.mac, "romfile": ""}
    tap = spec.taps[device.id]
    if not tap:
        return ["-device", json.dumps(options)]
    network = {
        "type": "tap",
        "id": f"{device.id}-tap",
        "ifname": tap,
        "script": "no",
        "downscript": "no",
        "vhost": False,
    }
    return ["-netdev", json.dumps(network), "-device", json.dumps({**options, "netdev": f"{device.id}-tap"})]


def _on_pci(device: Device) -> dict[str, object]:
    return {"driver": device.driver, "id": device.id, "bus": device.bus, "addr": device.address}


_BUILDERS: Final[dict[str, Callable[[Device, MachineSpec], list[str]]]] = {
    "virtio-serial-pci": _serial_controller,
    "virtserialport": _serial_port,
    "virtio-scsi-pci": _disk_controller,
    "scsi-hd": _disk,
    "virtio-net-pci": _card,
}


def _escaped(value: str) -> str:
    """For QEMU's key=value options, in which a comma ends a value unless it is doubled."""
    return value.replace(",", ",,")
