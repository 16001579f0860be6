"""The sandbox and the machine to and from their messages. What comes from a message is checked here, once.

Everything that reaches `*_from_proto` was written by somebody else: a caller of CreateSandbox, or the shim of another
host. What is wrong is `Rejected` with the field's name.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from sandshift.errors import Rejected
from sandshift.identifiers import identifier, shown
from sandshift.sandbox.model import Container, NetworkCard, Process, Route, Sandbox
from sandshift.sandbox.shape import Device, MachineShape
from sandshift.wire.sandshift import state_pb2

ACCELERATORS: Final = ("tcg", "kvm")
MTU_MIN, MTU_MAX = 68, 65535
"""Source: RFC 791 (an IPv4 link), and virtio's 16-bit field."""
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
"""What QEMU takes as a device id. Source: util/id.c, id_wellformed()."""
_MULTICAST_BIT: Final = 0x01


def sandbox_to_proto(sandbox: Sandbox) -> state_pb2.Sandbox:
    message = state_pb2.Sandbox(
        sandbox_id=sandbox.sandbox_id,
        hostname=sandbox.hostname,
        network_cards=[card_to_proto(card) for card in sandbox.network_cards],
        containers=[_container_to_proto(container) for container in sandbox.containers],
        annotations=sandbox.annotations,
        processes=[_process_to_proto(process) for process in sandbox.processes],
    )
    if sandbox.created_at_us:
        message.created_at.CopyFrom(_stamp(sandbox.created_at_us))
    return message


def sandbox_from_proto(message: state_pb2.Sandbox) -> Sandbox:
    """Raises Rejected: an id is empty or stands twice, or a card is wrong."""
    sandbox = Sandbox(
        sandbox_id=message.sandbox_id,
        hostname=message.hostname,
        network_cards=tuple(card_from_proto(card) for card in message.network_cards),
        containers=tuple(_container_from_proto(container) for container in message.containers),
        annotations=dict(message.annotations),
        created_at_us=message.created_at.ToMicroseconds(),
        processes=tuple(_process_from_proto(process) for process in message.processes),
    )
    _unique("container id", (container.container_id for container in sandbox.containers))
    _unique("guest id of a container", (container.guest_id for container in sandbox.containers))
    _unique("network card", (card.id for card in sandbox.network_cards))
    _unique("process id", (process.process_id for process in sandbox.processes))
    return sandbox


def card_to_proto(card: NetworkCard) -> state_pb2.NetworkCard:
    return state_pb2.NetworkCard(
        id=card.id,
        mac=card.mac,
        addresses=card.addresses,
        gateway=card.gateway,
        mtu=card.mtu,
        routes=[
            state_pb2.NetworkRoute(
                destination=way.destination, gateway=way.gateway, source=way.source, on_link=way.on_link
            )
            for way in card.routes
        ],
    )


def card_from_proto(message: state_pb2.NetworkCard) -> NetworkCard:
    """Raises Rejected: names the card and what is wrong with it."""
    if not _ID.fullmatch(message.id):
        raise Rejected(
            f"network card {message.id!r}: its id must begin with a letter and have at most 64 characters"
        )
    where = f"network card {message.id}"
    if message.mac and not _MAC.fullmatch(message.mac):
        raise Rejected(f"{where}: mac {message.mac!r} is not like 52:54:00:12:34:56")
    if message.mac and int(message.mac[:2], 16) & _MULTICAST_BIT:
        raise Rejected(f"{where}: mac {message.mac!r} is a multicast address: its first byte must be even")
    for address in message.addresses:
        _check_interface(where, address)
    if message.gateway:
        _check_gateway(where, message.gateway)
    if message.mtu and not MTU_MIN <= message.mtu <= MTU_MAX:
        raise Rejected(f"{where}: mtu {message.mtu} is outside {MTU_MIN} to {MTU_MAX}")
    return NetworkCard(
        id=message.id,
        mac=message.mac.lower(),
        addresses=tuple(message.addresses),
        gateway=message.gateway,
        mtu=message.mtu,
        routes=tuple(_route_from_proto(where, way) for way in message.routes),
    )


def _route_from_proto(where: str, message: state_pb2.NetworkRoute) -> Route:
    try:
        ipaddress.ip_network(message.destination)
    except ValueError as error:
        raise Rejected(f"{where}: route to {message.destination!r}: {error}") from error
    for what, address in (("gateway", message.gateway), ("source", message.source)):
        if address:
            _check_gateway(where, address, what)
    return Route(
        destination=message.destination,
        gateway=message.gateway,
        source=message.source,
        on_link=message.on_link,
    )


def shape_to_proto(shape: MachineShape) -> state_pb2.MachineShape:
    return state_pb2.MachineShape(
        machine_type=shape.machine_type,
        accelerator=shape.accelerator,
        cpu_model=shape.cpu_model,
        cpu_features=shape.cpu_features,
        vcpus=shape.vcpus,
        memory_bytes=shape.memory_bytes,
        devices=[_device_to_proto(device) for device in shape.devices],
        qemu_version=shape.qemu_version,
        kernel_command_line=shape.kernel_command_line,
        kernel_sha256=shape.kernel_sha256,
        initramfs_sha256=shape.initramfs_sha256,
        uuid=shape.uuid,
        generation_id=shape.generation_id,
        shared_memory=shape.shared_memory,
    )


def shape_from_proto(message: state_pb2.MachineShape) -> MachineShape:
    """Raises Rejected: no machine can be built from it."""
    if message.accelerator not in ACCELERATORS:
        raise Rejected(
            f"machine: accelerator {message.accelerator!r} is not one of {', '.join(ACCELERATORS)}"
        )
    for name in ("machine_type", "cpu_model", "qemu_version"):
        if not getattr(message, name):
            raise Rejected(f"machine: {name} is empty")
    if message.vcpus == 0 or message.memory_bytes == 0:
        raise Rejected(
            f"machine: {message.vcpus} vCPUs and {message.memory_bytes} bytes of memory make no machine"
        )
    devices = tuple(_device_from_proto(device) for device in message.devices)
    _unique("device", (device.id for device in devices))
    return MachineShape(
        machine_type=message.machine_type,
        accelerator=message.accelerator,
        cpu_model=message.cpu_model,
        vcpus=message.vcpus,
        memory_bytes=message.memory_bytes,
        devices=devices,
        qemu_version=message.qemu_version,
        kernel_command_line=message.kernel_command_line,
        kernel_sha256=message.kernel_sha256,
        initramfs_sha256=message.initramfs_sha256,
        uuid=message.uuid,
        generation_id=message.generation_id,
        cpu_features=tuple(message.cpu_features),
        shared_memory=message.shared_memory,
    )


def _device_to_proto(device: Device) -> state_pb2.Device:
    return state_pb2.Device(
        id=device.id,
        driver=device.driver,
        bus=device.bus,
        address=device.address,
        read_only=device.read_only,
        size_bytes=device.size_bytes,
        content_digest=device.content_digest,
        mac=device.mac,
    )


def _device_from_proto(message: state_pb2.Device) -> Device:
    """Id, driver, bus and address end up on QEMU's command line: nothing that could end an option may be in them."""
    if not _ID.fullmatch(message.id):
        raise Rejected(f"machine: device id {message.id!r} is not one that QEMU takes")
    for name in ("driver", "bus", "address", "mac"):
        value: str = getattr(message, name)
        if any(character in ",=" or not character.isprintable() for character in value):
            raise Rejected(f"machine: device {message.id} has {name} {value!r}")
    return Device(
        id=message.id,
        driver=message.driver,
        bus=message.bus,
        address=message.address,
        read_only=message.read_only,
        size_bytes=message.size_bytes,
        content_digest=message.content_digest,
        mac=message.mac,
    )


def _container_to_proto(container: Container) -> state_pb2.Container:
    return state_pb2.Container(
        guest_id=container.guest_id,
        container_id=container.container_id,
        pid=container.pid,
        processes=[_process_to_proto(process) for process in container.processes],
        annotations=container.annotations,
        layers=container.layers,
        writable=container.writable,
        mounts=container.mounts,
        started=container.started,
        paused=container.paused,
    )


def process_id(value: str) -> str:
    """What the agent may call a process: its name here becomes a file's, so it is held to the rule wherever it comes from.

    Raises:
        Rejected: it is neither an identifier nor two joined by a colon (`model.agent_id`), the second perhaps empty.
    """
    container, _, exec_id = value.partition(":")
    for part in (container, exec_id) if exec_id else (container,):
        try:
            identifier("process id", part)
        except Rejected as error:
            raise Rejected(f"process id {shown(value)}: {error.message}") from None
    return value


def _container_from_proto(message: state_pb2.Container) -> Container:
    for name in ("guest_id", "container_id"):
        if value := getattr(message, name):
            identifier(f"saved state: {name}", value)
    return Container(
        guest_id=message.guest_id,
        container_id=message.container_id,
        pid=message.pid,
        processes=tuple(_process_from_proto(process) for process in message.processes),
        annotations=dict(message.annotations),
        layers=tuple(message.layers),
        writable=message.writable,
        mounts=tuple(message.mounts),
        started=message.started,
        paused=message.paused,
    )


def _process_to_proto(process: Process) -> state_pb2.Process:
    return state_pb2.Process(
        process_id=process.process_id,
        pid=process.pid,
        args=process.args,
        terminal=process.terminal,
        stdin=process.stdin,
        exec_id=process.exec_id,
        started=process.started,
        spec=process.spec,
    )


def _process_from_proto(message: state_pb2.Process) -> Process:
    if message.process_id:
        process_id(message.process_id)
    return Process(
        process_id=message.process_id,
        pid=message.pid,
        args=tuple(message.args),
        terminal=message.terminal,
        stdin=message.stdin,
        exec_id=message.exec_id,
        started=message.started,
        spec=message.spec,
    )


def _unique(what: str, ids: Iterable[str]) -> None:
    counted = Counter(ids)
    if "" in counted:
        raise Rejected(f"saved state: {what} is empty")
    if twice := sorted(name for name, count in counted.items() if count > 1):
        raise Rejected(f"saved state: {what} {', '.join(twice)} stands there more than once")


def _check_interface(where: str, address: str) -> None:
    try:
        ipaddress.ip_interface(address)
    except ValueError as error:
        raise Rejected(f"{where}: address {address!r} is not like 10.9.0.50/24") from error
    if "/" not in address:
        raise Rejected(f"{where}: address {address!r} has no prefix length: write it like 10.9.0.50/24")


def _check_gateway(where: str, gateway: str, what: str = "gateway") -> None:
    try:
        ipaddress.ip_address(gateway)
    except ValueError as error:
        raise Rejected(f"{where}: {what} {gateway!r} is not an IP address") from error


def _stamp(at_us: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(at_us)
    return stamp
