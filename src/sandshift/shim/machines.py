"""Which machines this host makes: from configuration, guest image and what QEMU can do."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sandshift.errors import NotFound
from sandshift.image import build as image_build
from sandshift.image.store import published
from sandshift.shim.parts import BootFiles, Wish
from sandshift.vmm.standard import DiskPlan, standard_shape

if TYPE_CHECKING:
    from sandshift.config import Config
    from sandshift.image.store import GuestImage
    from sandshift.sandbox.model import Sandbox
    from sandshift.sandbox.shape import MachineShape
    from sandshift.vmm.machine import Vmm

MIB: Final = 1 << 20


class HostMachines:
    def __init__(self, config: Config, vmm: Vmm) -> None:
        self._config = config
        self._vmm = vmm
        self._cache_dir = Path(config.places.cache_dir)

    async def shape_for(self, wish: Wish, model: Sandbox) -> tuple[MachineShape, BootFiles]:
        image = await asyncio.to_thread(image_build.find, self._cache_dir)
        if image is None:
            raise NotFound(
                f"there is no guest image in {self._cache_dir}: make it with 'sandshift image build'"
            )
        vm = self._config.vm
        shape = standard_shape(
            machine_type=vm.machine_type or "pc-q35-10.0",
            accelerator="tcg",
            cpu_model=vm.cpu_model or "max",
            qemu_version="10.0.2",
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
        wanted = {device.content_digest for device in shape.devices if device.content_digest}
        for image in images:
            if image.root_digest in wanted and image.description.kernel_sha256 == shape.kernel_sha256:
                return _files(image)
        raise NotFound(
            f"this host has no guest image with root {', '.join(sorted(wanted))}: build the image of the same release, "
            f"or copy {self._cache_dir}/images from the source"
        )

    async def template_for(self, shape: MachineShape, files: BootFiles) -> Path | None:
        return None


def _files(image: GuestImage) -> BootFiles:
    return BootFiles(image.kernel, image.initramfs, image.root)
