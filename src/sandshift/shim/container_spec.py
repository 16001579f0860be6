"""From a bundle to what the guest is asked for: the OCI spec read, its root file system and mounts packed as disk files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sandshift.errors import NotSupported, Rejected
from sandshift.rootfs.plan import DiskFile, RootfsPlan
from sandshift.sandbox.disks import DiskLayer, GuestMount

if TYPE_CHECKING:
    from sandshift.sandbox.patching import Mount
    from sandshift.shim.parts import Parts

SPEC_FILE: Final = "config.json"
SPEC_BYTES_MAX: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class FolderMount:
    """A folder of this host that a container sees: packed as a disk, mounted by the guest."""

    disk: DiskFile
    mount: GuestMount
    """Its layer is filled in when the disk is plugged in."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A container as it can be had in a VM."""

    spec: bytes
    """For runc in the guest: JSON."""
    annotations: dict[str, str]
    plan: RootfsPlan
    files: tuple[GuestMount, ...] = ()
    folders: tuple[FolderMount, ...] = ()

    @property
    def folder_disks(self) -> tuple[DiskFile, ...]:
        return tuple(folder.disk for folder in self.folders)

    def guest_mounts(self, layers: Sequence[DiskLayer]) -> tuple[GuestMount, ...]:
        """All mounts; `layers`: where the disks of the folders are plugged in, in their order."""
        placed = (
            replace(folder.mount, layer=layer) for folder, layer in zip(self.folders, layers, strict=True)
        )
        return (*self.files, *placed)


def read_spec(bundle: Path) -> Mapping[str, Any]:
    """The OCI spec of a bundle. Blocks.

    Raises:
        Rejected: there is none, or it is no JSON object.
    """
    path = bundle / SPEC_FILE
    try:
        if path.stat().st_size > SPEC_BYTES_MAX:
            raise Rejected(f"{path} has more than {SPEC_BYTES_MAX} bytes")
        spec = json.loads(path.read_bytes())
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Rejected(f"{path} is no JSON: {error}") from error
    if not isinstance(spec, dict):
        raise Rejected(f"{path} is no JSON object")
    return spec


def annotations_of(spec: Mapping[str, Any]) -> dict[str, str]:
    found = spec.get("annotations") or {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


class Fitter:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def fit(self, bundle: Path, mounts: Sequence[Mount]) -> Fitted:
        """Read and pack; nothing is plugged in yet. Raises what the packer and the spec's rules do."""
        if self._parts.packer is None:
            raise NotSupported("this shim has no packer: it cannot make disks of a root file system")
        spec = await asyncio.to_thread(read_spec, bundle)
        annotations = annotations_of(spec)
        plan = await self._parts.packer.plan(mounts, bundle)
        root = spec.get("root") or {}
        return Fitted(
            spec=json.dumps(spec).encode(),
            annotations=annotations,
            plan=replace(plan, read_only=plan.read_only or bool(root.get("readonly"))),
        )
