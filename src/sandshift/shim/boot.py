"""From a wish to a VM description: image, machine, taps, and a template where one fits."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from sandshift.config import Config
from sandshift.errors import NotFound
from sandshift.image.store import GuestImage
from sandshift.sandbox.model import NetworkCard, Sandbox
from sandshift.sandbox.shape import MachineShape
from sandshift.session.right import Licence
from sandshift.shim.durable import make_folder
from sandshift.shim.parts import Parts
from sandshift.shim.places import Places
from sandshift.vmm.machine import DiskSource, MachineSpec

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller asked for; zero and empty mean the host's configuration."""

    memory_bytes: int = 0
    vcpus: int = 0
    cold: bool = False
    nameservers: tuple[str, ...] = ()

    def as_document(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Boot:
    spec: MachineSpec
    template: Path | None


class Booter:
    """Makes the descriptions of a sandbox's VM on this host, and the taps they name."""

    def __init__(self, config: Config, places: Places, parts: Parts, namespace: str) -> None:
        self._config = config
        self._places = places
        self._parts = parts
        self._namespace = namespace

    async def prepare(self, wish: Wish, model: Sandbox) -> Boot:
        """For a fresh sandbox."""
        image = await asyncio.to_thread(self._parts.find_image)
        shape = await self._parts.shape_for(image, wish, model)
        template = None
        if self._config.vm.template and not wish.cold:
            template = await self._parts.template_for(image, shape)
        return Boot(await self._spec(image, shape, model), template)

    async def prepare_incoming(self, model: Sandbox, shape: MachineShape) -> Boot:
        """For a sandbox that comes from elsewhere: the shape is what it is."""
        image = await asyncio.to_thread(self._parts.find_image)
        return Boot(await self._spec(image, shape, model), None)

    async def _spec(self, image: GuestImage, shape: MachineShape, model: Sandbox) -> MachineSpec:
        make_folder(self._places.run_dir)
        taps = await self._parts.taps.attach(self._namespace, model.sandbox_id, model.network_cards)
        self._places.taps_file.write_text(json.dumps(sorted(taps.values())))
        return MachineSpec(
            name=f"sandshift-{model.sandbox_id}",
            shape=shape,
            run_dir=make_folder(self._places.vm_dir),
            kernel=image.kernel,
            initramfs=image.initramfs,
            disks=(DiskSource("disk0", image.root),),
            taps=taps,
        )

    async def release(self, spec: MachineSpec) -> None:
        await self._parts.taps.detach(list(spec.taps.values()))
        self._places.taps_file.unlink(missing_ok=True)


