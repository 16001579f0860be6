"""From a wish to a VM description on this host: machine, boot files, taps, and a template where one fits."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sandshift.errors import Unavailable
from sandshift.shim.durable import make_folder, write_atomically
from sandshift.vmm.machine import DiskSource, MachineSpec

if TYPE_CHECKING:
    from pathlib import Path

    from sandshift.sandbox.model import Sandbox
    from sandshift.sandbox.shape import MachineShape
    from sandshift.shim.parts import BootFiles, Parts, Wish
    from sandshift.shim.places import Places


@dataclass(frozen=True, slots=True)
class Boot:
    spec: MachineSpec
    files: BootFiles
    template: Path | None


class Booter:
    """Makes the descriptions of a sandbox's VM on this host, and the taps that they name."""

    def __init__(self, places: Places, parts: Parts) -> None:
        self._places = places
        self._parts = parts

    async def prepare(self, wish: Wish, model: Sandbox, *, template: bool) -> Boot:
        """For a fresh sandbox."""
        machines = self._parts.machines
        shape, files = await machines.shape_for(wish, model)
        path = await machines.template_for(shape, files) if template and not wish.cold else None
        spec = await self._spec(shape, files, model, network_namespace=wish.network_namespace)
        return Boot(spec, files, path)

    async def prepare_incoming(
        self,
        model: Sandbox,
        shape: MachineShape,
        disks: tuple[DiskSource, ...] = (),
        *,
        network_namespace: str = "",
    ) -> Boot:
        """For a sandbox that comes from elsewhere: the shape is what it is. `disks`: beside the guest's own root."""
        files = await self._parts.machines.files_for(shape)
        spec = await self._spec(shape, files, model, disks, network_namespace=network_namespace)
        return Boot(spec, files, None)

    async def find(
        self,
        model: Sandbox,
        shape: MachineShape,
        disks: tuple[DiskSource, ...] = (),
        *,
        network_namespace: str = "",
    ) -> MachineSpec:
        """The description that a former shim made, its taps as they are."""
        files = await self._parts.machines.files_for(shape)
        names = self._places.recorded_taps()
        cards = (device.id for device in shape.devices if device.mac)
        return replace(
            self._described(shape, files, model, disks),
            taps=dict(zip(cards, names, strict=False)),
            network_namespace=network_namespace,
        )

    async def _spec(
        self,
        shape: MachineShape,
        files: BootFiles,
        model: Sandbox,
        disks: tuple[DiskSource, ...] = (),
        *,
        network_namespace: str,
    ) -> MachineSpec:
        make_folder(self._places.run_dir)
        described = replace(self._described(shape, files, model, disks), network_namespace=network_namespace)
        taps = await self._parts.taps.attach(model.sandbox_id, model.network_cards, network_namespace)
        names = list(taps.values())
        record = json.dumps({"taps": names, "network_namespace": network_namespace}).encode()
        try:
            await asyncio.to_thread(write_atomically, self._places.taps_file, record)
        except Unavailable:
            await self._parts.taps.detach(names, network_namespace)
            raise
        return replace(described, taps=taps)

    def _described(
        self, shape: MachineShape, files: BootFiles, model: Sandbox, disks: tuple[DiskSource, ...]
    ) -> MachineSpec:
        return MachineSpec(
            name=f"sandshift-{model.sandbox_id}",
            shape=shape,
            run_dir=make_folder(self._places.vm_dir),
            kernel=files.kernel,
            initramfs=files.initramfs,
            disks=(DiskSource("disk0", files.root), *disks),
        )

    def template_is_bad(self, boot: Boot) -> None:
        """The machine could not be loaded from its template."""
        self._parts.machines.template_is_bad(boot.spec.shape, boot.files)

    async def release(self, spec: MachineSpec) -> None:
        await self._parts.taps.detach(list(spec.taps.values()), spec.network_namespace)
        self._places.taps_file.unlink(missing_ok=True)
