"""From a bundle to what the guest is asked for: the OCI spec read, its root file system and mounts packed as disk files."""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sandshift.errors import NotSupported, Rejected, Unavailable
from sandshift.rootfs.plan import DiskFile, RootfsPlan, wants_scratch
from sandshift.sandbox.binds import FILE_BYTES_MAX, Handling, HostBind, Kind, Source, split_mounts
from sandshift.sandbox.disks import DiskLayer, GuestMount
from sandshift.sandbox.oci import PodShare, guest_spec, spec_from

if TYPE_CHECKING:
    from sandshift.sandbox.patching import Mount
    from sandshift.shim.parts import Packer, Parts

SPEC_FILE: Final = "config.json"
SPEC_BYTES_MAX: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class FolderMount:
    """A folder of this host that a container sees: packed as a disk, mounted by the guest."""

    disk: DiskFile
    mount: GuestMount
    """Its layer is filled in when the disk is plugged in."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The files of a container, as this host has them."""

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


@dataclass(frozen=True, slots=True)
class Fitted:
    """A container as it can be had in a VM."""

    spec: bytes
    """For runc in the guest: JSON."""
    annotations: dict[str, str]
    packed: Packed


def read_spec(bundle: Path) -> dict[str, Any]:
    """The OCI spec of a bundle. Blocks.

    Raises:
        Rejected: there is none, or it is no JSON object.
    """
    path = bundle / SPEC_FILE
    try:
        if path.stat().st_size > SPEC_BYTES_MAX:
            raise Rejected(f"{path} has more than {SPEC_BYTES_MAX} bytes")
        return spec_from(path.read_bytes())
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {error.strerror}") from error


def annotations_of(spec: Mapping[str, Any]) -> dict[str, str]:
    found = spec.get("annotations") or {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


class Fitter:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def fit(
        self,
        bundle: Path,
        mounts: Sequence[Mount],
        *,
        pod: PodShare,
        scratch_folder: Path | None = None,
    ) -> Fitted:
        """Read and pack; nothing is plugged in yet. Raises what the packer and the spec's rules do.

        Args:
            pod: what the spec has to fit in with.
            scratch_folder: where the file of a scratch disk goes, if the container's annotation asks for one; None: no such.
        """
        spec = await asyncio.to_thread(read_spec, bundle)
        fitted = guest_spec(spec, pod=pod)
        scratch = None
        if scratch_folder is not None and wants_scratch(annotations_of(spec)):
            scratch = scratch_folder / f"{secrets.token_hex(8)}.ext4"
        return Fitted(fitted, annotations_of(spec), await self._pack(spec, bundle, mounts, scratch))

    async def pack(self, bundle: Path, mounts: Sequence[Mount]) -> Packed:
        """The files of a container that runs already, in a guest that comes from elsewhere."""
        return await self._pack(await asyncio.to_thread(read_spec, bundle), bundle, mounts, None)

    async def _pack(
        self, spec: Mapping[str, Any], bundle: Path, mounts: Sequence[Mount], scratch: Path | None
    ) -> Packed:
        packer = self._parts.packer
        if packer is None:
            raise NotSupported("this shim has no packer: it cannot make disks of a root file system")
        files, folders = await self._bring_in(packer, split_mounts(spec).binds)
        plan = await packer.plan(mounts, bundle, scratch_file=scratch)
        root = spec.get("root") or {}
        read_only = plan.read_only or bool(root.get("readonly"))
        return Packed(replace(plan, read_only=read_only), files, folders)

    async def _bring_in(
        self, packer: Packer, binds: Sequence[HostBind]
    ) -> tuple[tuple[GuestMount, ...], tuple[FolderMount, ...]]:
        """The host's files and folders that the container sees. All are looked at before any is packed."""
        ways = [(bind, bind.handling(await asyncio.to_thread(look_at, bind.source))) for bind in binds]
        files: list[GuestMount] = []
        folders: list[FolderMount] = []
        for bind, way in ways:
            if way is Handling.COPY:
                files.append(await asyncio.to_thread(_copy, bind))
            else:
                mount = GuestMount(bind.destination, read_only=True)
                folders.append(FolderMount(await packer.pack_folder(Path(bind.source)), mount))
        return tuple(files), tuple(folders)


def look_at(source: str) -> Source:
    """What this host has at a bind's source. Blocks."""
    try:
        found = os.stat(source)  # noqa: PTH116 - one call gives all
    except OSError:
        return Source(Kind.MISSING)
    if stat.S_ISDIR(found.st_mode):
        return Source(Kind.FOLDER)
    if stat.S_ISREG(found.st_mode):
        return Source(Kind.FILE, found.st_size)
    return Source(Kind.OTHER)


def _copy(bind: HostBind) -> GuestMount:
    """Raises Unavailable if the file cannot be read any more. Blocks."""
    path = Path(bind.source)
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX)
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise Unavailable(f"{bind}: it cannot be read: {error.strerror}") from error
    return GuestMount(bind.destination, content=content, mode=mode, read_only=bind.read_only)
