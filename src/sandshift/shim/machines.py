"""Which machines this host makes: from configuration, guest image and what QEMU can do."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandshift.errors import NotFound, Rejected
from sandshift.image import build as image_build
from sandshift.image import template
from sandshift.image.store import published
from sandshift.sandbox.model import NetworkCard
from sandshift.sandbox.preflight import DestinationFacts, DiskFacts
from sandshift.sandbox.shape import is_card
from sandshift.session.right_licence import licence_of
from sandshift.shim.parts import BootFiles, Wish
from sandshift.vmm.host import survey
from sandshift.vmm.machine import DiskSource, MachineSpec
from sandshift.vmm.standard import DiskPlan, standard_shape

if TYPE_CHECKING:
    from sandshift.config import Config
    from sandshift.guest.client import Guest
    from sandshift.image.store import GuestImage
    from sandshift.sandbox.model import Sandbox
    from sandshift.sandbox.shape import MachineShape
    from sandshift.shim.parts import Taps
    from sandshift.vmm.machine import Machine, Vmm

MIB: Final = 1 << 20
BOOT_S: Final = 60.0
"""How long a cold guest may take to its agent's first answer: 3 s alone under TCG, more on a busy host."""


class HostMachines:
    def __init__(
        self, config: Config, vmm: Vmm, taps: Taps, connect_guest: Callable[[Path, float], Awaitable[Guest]]
    ) -> None:
        """`taps`: of no bridge, for guests that are booted for a template."""
        self._config = config
        self._vmm = vmm
        self._taps = taps
        self._connect_guest = connect_guest
        self._templates = template.TemplateStore(Path(config.places.cache_dir))
        self._cache_dir = Path(config.places.cache_dir)

    async def shape_for(self, wish: Wish, model: Sandbox) -> tuple[MachineShape, BootFiles]:
        image = await asyncio.to_thread(image_build.find, self._cache_dir)
        if image is None:
            raise NotFound(
                f"there is no guest image in {self._cache_dir}: make it with 'sandshift image build'"
            )
        vm = self._config.vm
        here = await survey(vm, self._cache_dir, image.kernel)
        if vm.machine_type and vm.machine_type not in here.machine_types:
            raise Rejected(
                f"vm.machine_type = {vm.machine_type!r}: QEMU {here.version} has {', '.join(here.machine_types)}"
            )
        shape = standard_shape(
            machine_type=vm.machine_type or here.machine_types[0],
            accelerator=here.accelerator,
            cpu_model=vm.cpu_model or here.cpu_model,
            cpu_features=here.cpu_features,
            qemu_version=here.version,
            memory_bytes=wish.memory_bytes or vm.memory_mib * MIB,
            vcpus=wish.vcpus or vm.vcpus,
            kernel_command_line=image.kernel_command_line,
            kernel_sha256=image.description.kernel_sha256,
            initramfs_sha256=image.description.initramfs_sha256,
            uuid=str(uuid.uuid4()),
            generation_id=str(uuid.uuid4()),
            disks=(DiskPlan(image.description.root_bytes, image.root_digest),),
            macs=[card.mac for card in model.network_cards],
            shared_memory=vm.shared_memory,
        )
        return shape, _files(image)

    async def files_for(self, shape: MachineShape) -> BootFiles:
        images = await asyncio.to_thread(published, self._cache_dir)
        wanted = _digests(shape)
        for image in images:
            if image.root_digest in wanted and image.description.kernel_sha256 == shape.kernel_sha256:
                return _files(image)
        raise NotFound(
            f"this host has no guest image with root {', '.join(sorted(wanted))}: build the image of the same release, "
            f"or copy {self._cache_dir}/images from the source"
        )

    async def facts(self, shape: MachineShape) -> DestinationFacts:
        images = await asyncio.to_thread(published, self._cache_dir)
        fitting = next((image for image in images if image.root_digest in _digests(shape)), None)
        image = fitting or next(iter(images), None)
        here = await survey(self._config.vm, self._cache_dir, image.kernel if image else None)
        disk = DiskFacts(image.description.root_bytes, image.root_digest) if image else None
        return DestinationFacts(
            qemu_version=here.version,
            accelerator=here.accelerator,
            machine_types=frozenset(here.machine_types),
            cpu_models=here.cpu_model_names,
            cpu_features=frozenset(here.cpu_features_most),
            drivers=frozenset(here.drivers),
            memory_free_bytes=await asyncio.to_thread(free_memory_bytes),
            kernel_sha256=image.description.kernel_sha256 if image else "",
            initramfs_sha256=image.description.initramfs_sha256 if image else "",
            disks={"disk0": disk} if disk else {},
            now_us=time.time_ns() // 1000,
        )

    async def template_for(self, shape: MachineShape, files: BootFiles) -> Path:
        key = template.key_of(files.image, shape)
        return await self._templates.ensure(key, lambda path: self._save_template(shape, files, path))

    def template_is_bad(self, shape: MachineShape, files: BootFiles) -> None:
        self._templates.drop(template.key_of(files.image, shape))

    async def _save_template(self, shape: MachineShape, files: BootFiles, path: Path) -> None:
        """Boot a guest that is nobody's, wait for its agent, and save it. Nobody's: no uuid, MAC or secret of a sandbox."""
        from sandshift.guest.warmth import warm_up  # noqa: PLC0415  (only who makes a template needs it)

        name = f"template-{secrets.token_hex(4)}"
        cards = tuple(NetworkCard(id=device.id) for device in shape.devices if is_card(device))
        taps = await self._taps.attach(name, cards)
        with tempfile.TemporaryDirectory(prefix="sandshift-template-") as run_dir:
            spec = MachineSpec(
                name=name,
                shape=nobodys(shape),
                run_dir=Path(run_dir),
                kernel=files.kernel,
                initramfs=files.initramfs,
                disks=(DiskSource("disk0", files.root),),
                taps=taps,
            )
            machine: Machine | None = None
            try:
                machine = await self._vmm.start(spec)
                guest = await self._connect_guest(machine.agent_socket, BOOT_S)
                await machine.run_vcpus(licence_of(None))
                await guest.info()
                await warm_up(guest)
                await guest.close()
                await machine.save(path)
            finally:
                if machine is not None:
                    await machine.destroy()
                await self._taps.detach(list(taps.values()))


def nobodys(shape: MachineShape) -> MachineShape:
    """The machine as a template is booted: of this shape, with placeholders for what is one sandbox's alone."""
    macs = (f"52:54:00:00:00:{number:02x}" for number in itertools.count())
    devices = tuple(
        replace(device, mac=next(macs)) if is_card(device) else device for device in shape.devices
    )
    return replace(shape, uuid=str(uuid.UUID(int=0)), generation_id=str(uuid.uuid4()), devices=devices)


def free_memory_bytes() -> int:
    """What the kernel says new programs can have. Source: MemAvailable in /proc/meminfo. Blocks."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return 0


def _digests(shape: MachineShape) -> set[str]:
    return {device.content_digest for device in shape.devices if device.content_digest}


def _files(image: GuestImage) -> BootFiles:
    return BootFiles(image.kernel, image.initramfs, image.root, image)
