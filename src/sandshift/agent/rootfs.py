"""A container's files in the guest: its layers mounted and overlaid, what it brings laid out, and all of it let go again.

Everything of a container is in one folder with a short name, so that 128 layers fit into the one page of options that
mount(2) takes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from sandshift.agent import disks, libc
from sandshift.wire.sandshift import agent_pb2 as pb
from ttrpc import Code, StatusError

FILE_SYSTEMS: Final = frozenset({"erofs", "ext4"})
LAYERS_MAX: Final = 128
_DETACHED: Final = libc.MNT_DETACH


class RootFiles:
    """What of the guest's file systems one container takes. Filled by `mount`, emptied by `release`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.sources: dict[str, str] = {}
        """By destination: the guest's path that is bound there."""
        self._mounted: list[str] = []
        self._by_lun: dict[int, str] = {}

    async def mount(self, rootfs: pb.Rootfs, mounts: Iterable[pb.GuestMount]) -> None:
        """Mount everything. After a failure `release` takes back what was done.

        Raises:
            StatusError: NOT_FOUND (a disk, a path in one), INVALID_ARGUMENT (no such file system), RESOURCE_EXHAUSTED.
        """
        try:
            self.root.mkdir(parents=True)
            await self._mount_root(rootfs)
            for number, one in enumerate(mounts):
                self.sources[_clean(one.destination)] = await self._bring(number, one)
        except OSError as error:
            raise _explained(error) from error

    def release(self) -> None:
        """Unmount everything and remove the folder. Idempotent; what is still busy goes when its last user does."""
        for target in reversed(self._mounted):
            try:
                libc.unmount(target)
            except OSError:
                with contextlib.suppress(OSError):
                    libc.unmount(target, _DETACHED)
        self._mounted.clear()
        self._by_lun.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _mount_root(self, rootfs: pb.Rootfs) -> None:
        if len(rootfs.layers) > LAYERS_MAX:
            raise StatusError(
                Code.INVALID_ARGUMENT,
                f"the root has {len(rootfs.layers)} layers: up to {LAYERS_MAX} are possible",
            )
        if not rootfs.layers:
            await self._mount_upper(rootfs, str(self.root))
            return
        layers = [await self._layer(layer) for layer in rootfs.layers]
        upper = self.folder / "upper"
        upper.mkdir()
        await self._mount_upper(rootfs, str(upper))
        for name in ("files", "work"):
            (upper / name).mkdir(exist_ok=True)
        options = f"lowerdir={':'.join(layers)},upperdir={upper}/files,workdir={upper}/work"
        self._mount("overlay", str(self.root), "overlay", 0, options)

    async def _mount_upper(self, rootfs: pb.Rootfs, target: str) -> None:
        """Where changes go: the disk, or guest memory."""
        if rootfs.HasField("writable"):
            device = await disks.wait_for(rootfs.writable.lun)
            self._mount(device, target, _file_system(rootfs.writable))
        else:
            size = str(rootfs.writable_bytes) if rootfs.writable_bytes else "50%"
            self._mount("tmpfs", target, "tmpfs", 0, f"mode=0755,size={size}")

    async def _layer(self, layer: pb.Layer) -> str:
        """Where a read-only disk is mounted."""
        if (known := self._by_lun.get(layer.lun)) is not None:
            return known
        device = await disks.wait_for(layer.lun)
        target = self.folder / str(len(self._by_lun))
        target.mkdir()
        self._mount(device, str(target), _file_system(layer), libc.MS_RDONLY)
        self._by_lun[layer.lun] = str(target)
        return str(target)

    async def _bring(self, number: int, one: pb.GuestMount) -> str:
        if not one.HasField("layer"):
            return self._write(f"file{number}", one)
        return _within(await self._layer(one.layer), one)

    def _write(self, name: str, one: pb.GuestMount) -> str:
        path = self.folder / name
        path.write_bytes(one.content)
        path.chmod(one.mode & 0o7777 or 0o644)
        return str(path)

    def _mount(self, source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
        try:
            libc.mount(source, target, kind, flags, options)
        except OSError as error:
            raise StatusError(
                Code.INVALID_ARGUMENT, f"{source} cannot be mounted as {kind}: {error.strerror}"
            ) from error
        self._mounted.append(target)


def _within(base: str, one: pb.GuestMount) -> str:
    """The path of a packed folder that is mounted."""
    path = Path(os.path.realpath(f"{base}/{one.layer_path}"))
    if not path.is_relative_to(base):
        raise StatusError(
            Code.INVALID_ARGUMENT, f"{one.layer_path} leads out of the folder for {one.destination}"
        )
    if not path.exists():
        raise StatusError(
            Code.NOT_FOUND, f"{one.layer_path} is not in the folder packed for {one.destination}"
        )
    return str(path)


def _file_system(layer: pb.Layer) -> str:
    if layer.file_system not in FILE_SYSTEMS:
        raise StatusError(
            Code.INVALID_ARGUMENT,
            f"disk {layer.lun}: a file system {layer.file_system!r} cannot be mounted: it must be erofs or ext4",
        )
    return layer.file_system


def _clean(destination: str) -> str:
    return os.path.normpath(destination)


def _explained(error: OSError) -> StatusError:
    return StatusError(
        Code.RESOURCE_EXHAUSTED,
        f"the container's files cannot be laid out: {error.filename}: {error.strerror}",
    )
