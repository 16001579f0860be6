"""The bare side of bench/migration.py: the same guest from the same template, moved by bench/_bare_qemu.py alone.

Our own code boots the guest and then lets go of it; nothing of it runs during the move.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench import _bare_qemu
from bench._movers import Moved
from sandshift import net
from sandshift.cli.demo.lab import Lab, LabHost
from sandshift.cli.demo.scenario import fleet_host
from sandshift.cli.demo.topology import GUEST_ADDRESS, GUEST_MAC, PREFIX_LENGTH
from sandshift.cli.demo.workload import Workload
from sandshift.fleet.channel import make_channel
from sandshift.sandbox.model import NetworkCard, Sandbox
from sandshift.session.right_licence import licence_of
from sandshift.shim.parts import Parts, Wish
from sandshift.shim.real_parts import real_parts
from sandshift.vmm.machine import DiskSource, Machine, MachineSpec

NAMESPACE = "bare"
AGENT_REPLY_S = 30.0
PSK_BYTES = 32
CLONE_NEWNET = 0x40000000
"""Source: linux/sched.h."""


@dataclass(frozen=True, slots=True)
class _Place:
    """One host's part: its folder, its parts, and its taps."""

    host: LabHost
    folder: Path
    parts: Parts
    taps: net.Plan
    tap: str


class Bare:
    """Two QEMUs and a script."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._places: tuple[_Place, _Place] | None = None
        self._encrypted = True

    @contextlib.asynccontextmanager
    async def guest(self, lab: Lab, workload: Workload) -> AsyncIterator[None]:
        name = f"bare-{uuid.uuid4().hex[:8]}"
        card = NetworkCard("net0", GUEST_MAC, (f"{GUEST_ADDRESS}/{PREFIX_LENGTH}",))
        model = Sandbox(name, network_cards=(card,))
        places = tuple(_place(host, name) for host in (lab.host_a, lab.host_b))
        source, destination = places
        self._places = (source, destination)
        async with contextlib.AsyncExitStack() as stack:
            for place in places:
                stack.callback(shutil.rmtree, place.folder, ignore_errors=True)
                await net.apply(place.taps, network_namespace=place.host.namespace)
                stack.push_async_callback(net.remove, place.taps, network_namespace=place.host.namespace)
            spec = await self._boot(source, model, workload, stack)
            incoming = replace(
                spec, name=f"{name}-incoming", run_dir=destination.folder, taps={"net0": destination.tap}
            )
            with inside(destination.host.namespace):
                machine = await destination.parts.vmm.start_incoming(incoming)
            await machine.detach()
            stack.push_async_callback(_end, destination, incoming)
            yield

    async def _boot(
        self, place: _Place, model: Sandbox, workload: Workload, stack: contextlib.AsyncExitStack
    ) -> MachineSpec:
        """The guest with its workload, from the template, its QMP socket free again."""
        parts = place.parts
        shape, files = await parts.machines.shape_for(Wish(memory_bytes=self._memory_bytes), model)
        with inside(place.host.namespace):
            template = await parts.machines.template_for(shape, files)
        spec = MachineSpec(
            name=model.sandbox_id,
            shape=shape,
            run_dir=place.folder,
            kernel=files.kernel,
            initramfs=files.initramfs,
            disks=(DiskSource("disk0", files.root),),
            taps={"net0": place.tap},
        )
        assert template is not None
        with inside(place.host.namespace):
            machine = await parts.vmm.start_from_template(spec, template)
        stack.push_async_callback(_end, place, spec)
        guest = await parts.connect_guest(machine.agent_socket, AGENT_REPLY_S)
        await machine.run_vcpus(licence_of(None))
        await guest.personalize(
            entropy=secrets.token_bytes(64),
            machine_id=uuid.uuid4().hex,
            hostname=model.sandbox_id,
            cards=model.network_cards,
        )
        await guest.start_process("main", workload.arguments())
        await guest.close()
        await machine.detach()
        return spec

    async def move(self) -> Moved:
        assert self._places is not None
        source, destination = self._places
        migration = source.host.config.migration
        channel = await make_channel(fleet_host(source.host), fleet_host(destination.host))
        try:
            moved = await _bare_qemu.move(
                source.folder,
                destination.folder,
                (channel.source, channel.destination),
                psk=secrets.token_bytes(PSK_BYTES) if migration.encryption == "tls-psk" else b"",
                downtime_limit_ms=migration.downtime_limit_ms,
                bandwidth_bytes_per_s=migration.bandwidth_mib_per_s << 20,
            )
        finally:
            channel.close()
        return Moved(moved.total_ms, moved.blackout_ms, moved.passes, moved.bytes_transferred, {})


def _place(host: LabHost, name: str) -> _Place:
    folder = host.folder / name
    folder.mkdir(mode=0o700)
    tap = net.tap_name(NAMESPACE, f"{name}-{host.names.letter}", 0)
    plan = net.plan_taps([net.Tap(tap, bridge=host.config.network.bridge)])
    return _Place(host, folder, real_parts(host.config, NAMESPACE), plan, tap)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in a network namespace for a while: what it starts stays there. Nothing else may run meanwhile."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        net.enter(namespace)
        yield
    finally:
        if _libc.setns(home, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "cannot go back to the machine's own network namespace")
        os.close(home)


_libc = ctypes.CDLL(None, use_errno=True)


async def _end(place: _Place, spec: MachineSpec) -> None:
    machine: Machine | None = await place.parts.vmm.reattach(spec)
    if machine is not None:
        await machine.destroy()
