"""Real VMs of the built image, for tests and measurements."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path

import pytest

from sandshift.guest.client import Guest
from sandshift.guest.warmth import warm_up
from sandshift.image import build
from sandshift.image.store import GuestImage
from sandshift.sandbox.shape import MachineShape
from sandshift.vmm.machine import DiskSource, MachineSpec
from sandshift.vmm.qemu import QemuVmm
from sandshift.vmm.qemu_machine import QemuMachine
from sandshift.vmm.standard import DiskPlan, standard_shape
from tests.vmm.machine_suite import LICENCE

MEMORY_BYTES = 256 << 20
CACHE = Path(os.environ.get("SANDSHIFT_TEST_IMAGES", "/var/cache/sandshift"))

needs_vm = [
    pytest.mark.vm,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
    pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="erofs-utils is not installed"),
]


def image() -> GuestImage:
    """This checkout's image, built unless it is there."""
    return build.find(CACHE) or build.build(CACHE)


@cache
def qemu_version() -> str:
    if shutil.which("qemu-system-x86_64") is None:
        return "10.0.2"
    said = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return said.split("version ")[1].split()[0]


def shape(made: GuestImage, macs: tuple[str, ...] = ()) -> MachineShape:
    return standard_shape(
        machine_type="pc-q35-10.0",
        accelerator="tcg",
        cpu_model="max",
        qemu_version=qemu_version(),
        memory_bytes=MEMORY_BYTES,
        vcpus=1,
        kernel_command_line=made.kernel_command_line,
        kernel_sha256=made.description.kernel_sha256,
        initramfs_sha256=made.description.initramfs_sha256,
        uuid=str(uuid.uuid4()),
        generation_id=str(uuid.uuid4()),
        disks=(DiskPlan(made.description.root_bytes, made.root_digest),),
        macs=macs,
    )


class Rig:
    """Makes VMs in `folder`."""

    def __init__(self, made: GuestImage, folder: Path) -> None:
        self.image = made
        self.folder = folder
        self.vmm = QemuVmm()

    def spec(self, name: str, like: MachineShape | None = None) -> MachineSpec:
        run_dir = self.folder / name
        run_dir.mkdir(mode=0o700)
        return MachineSpec(
            name=f"gi-{name}",
            shape=like or shape(self.image),
            run_dir=run_dir,
            kernel=self.image.kernel,
            initramfs=self.image.initramfs,
            disks=(DiskSource("disk0", self.image.root),),
        )

    async def save_template(self, path: Path) -> None:
        """Boot once and save, as the shim does."""
        machine = await self.vmm.start(self.spec("template"))
        try:
            guest = await Guest.connect(machine.agent_socket, reply_s=60)
            await machine.run_vcpus(LICENCE)
            await guest.info()
            await warm_up(guest)
            await guest.close()
            await machine.save(path)
        finally:
            await machine.destroy()

    @contextlib.asynccontextmanager
    async def clone(self, name: str, template: Path) -> AsyncIterator[tuple[QemuMachine, Guest]]:
        """A guest from the template, personalized and running."""
        machine = await self.vmm.start_from_template(self.spec(name), template)
        try:
            guest = await Guest.connect(machine.agent_socket)
            await machine.run_vcpus(LICENCE)
            await make_itself(guest, name)
            yield machine, guest
            await guest.close()
        finally:
            await machine.destroy()


async def make_itself(guest: Guest, name: str) -> None:
    await guest.personalize(entropy=os.urandom(64), machine_id=uuid.uuid4().hex, hostname=name)
