"""Makes disks of what a snapshotter hands over: files as they are, folders packed into the host's cache.

Everything that blocks (mounting, walking, hashing, packing, fsync) runs in threads of its own; mounts are in a mount
namespace of the one thread that packs, and are gone with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from sandshift.errors import NotSupported, Rejected, Unavailable
from sandshift.rootfs import erofs, kernel, scratch, sources, tree
from sandshift.rootfs.cache import CachedImage, ImageCache, require_space
from sandshift.rootfs.mounts import BlockFile, Folders, LayerFiles, read
from sandshift.rootfs.plan import EROFS, EXT4, DiskFile, RootfsPlan
from sandshift.sandbox.patching import Mount

PACKINGS_MAX: Final = 2
"""At a time, per shim."""
TRIES_MAX: Final = 3
"""For a folder that is written to while it is packed."""
SETTLED_S: Final = 2.0
"""Times of files are not exact: a file that changed so lately may change again without a trace."""
CONFIG_BYTES_MAX: Final = 4 << 20

T = TypeVar("T")


class Packer:
    """One per shim, on the host's cache. Methods raise errors of `sandshift.errors`, and leave nothing mounted."""

    def __init__(self, cache_dir: Path, *, cache: ImageCache | None = None) -> None:
        self._cache = cache or ImageCache(cache_dir)
        self._turns = asyncio.Semaphore(PACKINGS_MAX)

    async def plan(
        self, mounts: Sequence[Mount], bundle: Path, *, scratch_file: Path | None = None
    ) -> RootfsPlan:
        """The disks of a container's root file system.

        Args:
            mounts: Task.Create's; without any the root is the folder that the bundle's config.json names.
            bundle: the container's.
            scratch_file: made as a disk for changes, where the snapshotter gives none; None: they go to guest memory.

        Raises:
            Rejected: what cannot be a disk, by field, value and remedy. NotFound: a source is gone.
            NoRoom: a limit, or no space. NotSupported: no mkfs.erofs. Unavailable: it was written to meanwhile.
        """
        recipe = read(mounts) if mounts else await self._in_thread(lambda: _root_of(bundle))
        match recipe:
            case Folders():
                image = await self._in_thread(lambda: self._pack(recipe))
                plan = RootfsPlan((_disk(image),), read_only=recipe.read_only)
            case BlockFile():
                plan = await self._in_thread(lambda: self._block_file(recipe))
            case LayerFiles():
                plan = await self._in_thread(lambda: self._layer_files(recipe))
        if scratch_file is None or plan.writable is not None or plan.read_only:
            return plan
        disk = await self._in_thread(lambda: scratch.make(scratch_file))
        return RootfsPlan(plan.layers, disk)

    async def pack_folder(self, path: Path) -> DiskFile:
        """A folder of this host, as it is now and without what is mounted below it, as a read-only disk.

        Raises as `plan` does.
        """
        mount = Mount(type="bind", source=str(path), options=("ro",))
        recipe = read([mount])
        assert isinstance(recipe, Folders)
        return _disk(await self._in_thread(lambda: self._pack(recipe)))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Not interrupted when the caller is cancelled: what is packed then is there the next time."""

        async def run() -> T:
            async with self._turns:
                return await asyncio.to_thread(work)

        return await asyncio.shield(run())

    # In threads

    def _pack(self, recipe: Folders) -> CachedImage:
        key = sources.key_of_layers(recipe)
        if key is not None and (image := self._cache.find(key)) is not None:
            return image
        erofs.program()
        place = self._cache.place()
        try:
            image = kernel.with_private_mounts(lambda: self._mount_and_pack(recipe, place))
        except PermissionError as error:
            raise NotSupported(
                f"root file system: mounts need root (CAP_SYS_ADMIN): {error.strerror}"
            ) from error
        except OSError as error:
            raise Unavailable(f"root file system: {error.filename or place}: {error.strerror}") from error
        if key is not None:
            self._cache.note(key, image)
        self._cache.prune()
        return image

    def _mount_and_pack(self, recipe: Folders, place: Path) -> CachedImage:
        paths = [recipe.upper, *recipe.lower] if recipe.upper else list(recipe.lower)
        with kernel.opened(paths, sources.open_source) as folders:
            if len(folders) == 1:
                kernel.show_folder(folders[0], place)
            else:
                kernel.show_merged(folders, place, recipe.options)
        for _ in range(TRIES_MAX):
            found = tree.digest_of(str(place))
            key = sources.key_of_content(found.digest)
            with self._cache.locked(key):
                if (image := self._cache.find(key)) is not None:
                    return image
                if (image := self._pack_mounted(place, found)) is not None:
                    self._cache.note(key, image)
                    return image
        raise Unavailable(
            f"{paths[0]} was written to each of the {TRIES_MAX} times that it was packed: stop who writes, then repeat"
        )

    def _pack_mounted(self, place: Path, found: tree.Tree) -> CachedImage | None:
        """None: somebody wrote meanwhile."""
        with self._cache.new_file() as file:
            require_space(file.parent, found.size_bytes)
            erofs.pack(place, file)
            if tree.fingerprint_of(str(place)) != found.fingerprint:
                return None
            return self._cache.publish(file)

    def _block_file(self, recipe: BlockFile) -> RootfsPlan:
        if recipe.read_only:
            return RootfsPlan((self._layer(recipe.path, recipe.file_system),), read_only=True)
        return RootfsPlan((), _writable(recipe.path))

    def _layer_files(self, recipe: LayerFiles) -> RootfsPlan:
        layers = [self._layer(path, EROFS) for path in recipe.layers]
        if recipe.upper and _holds_something(recipe.upper):
            layers.insert(0, _disk(self._pack(Folders((recipe.upper,)))))
        writable = _writable(recipe.writable) if recipe.writable else None
        return RootfsPlan(tuple(layers), writable, read_only=recipe.read_only)

    def _layer(self, path: str, file_system: str) -> DiskFile:
        descriptor = sources.open_source(path, os.O_RDONLY)
        try:
            size_bytes = sources.check_file(descriptor, path, file_system)
            digest = self._digest(descriptor)
        finally:
            os.close(descriptor)
        return DiskFile(Path(path), file_system, size_bytes, digest, read_only=True)

    def _digest(self, descriptor: int) -> str:
        """Of a file that nobody writes any more. One that was written just now is not taken for that."""
        key = sources.key_of_file(descriptor)
        if key is not None and (known := self._cache.known_digest(key)) is not None:
            return known
        digest = sources.content_of(descriptor)
        settled = time.time() - os.fstat(descriptor).st_mtime > SETTLED_S
        if key is not None and settled and sources.key_of_file(descriptor) == key:
            self._cache.note_digest(key, digest)
        return digest


def _disk(image: CachedImage) -> DiskFile:
    return DiskFile(image.path, EROFS, image.size_bytes, image.digest, read_only=True)


def _writable(path: str) -> DiskFile:
    descriptor = sources.open_source(path, os.O_RDONLY)
    try:
        size_bytes = sources.check_file(descriptor, path, EXT4)
    finally:
        os.close(descriptor)
    return DiskFile(Path(path), EXT4, size_bytes, "", read_only=False)


def _holds_something(path: str) -> bool:
    descriptor = sources.open_source(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return bool(os.listdir(descriptor))  # noqa: PTH208 - of a descriptor
    finally:
        os.close(descriptor)


def _root_of(bundle: Path) -> Folders:
    """The folder that a bundle itself names: `ctr run --rootfs`."""
    path = bundle / "config.json"
    try:
        with path.open("rb") as file:
            spec = json.loads(file.read(CONFIG_BYTES_MAX))
        root = spec["root"]["path"]
        if not isinstance(root, str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Rejected(f"rootfs is empty, and {path} names no root.path instead of it") from error
    recipe = read([Mount(type="bind", source=os.path.normpath(bundle / root))])
    assert isinstance(recipe, Folders)
    return recipe
