"""Templates on disk: a booted guest saved once per image and machine, and found again. Knows nothing of how one is made.

A template is a file that QEMU wrote: the memory of a guest that nobody has personalized, so it holds no secret. It fits a
machine that is the same in everything but what belongs to one sandbox alone: its uuid, its generation id, its MACs.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from sandshift.errors import NoRoom, Rejected
from sandshift.image.store import GuestImage, sync
from sandshift.sandbox.shape import MachineShape

TEMPLATES_MAX: Final = 8
TEMPLATES_BYTES_MAX: Final = 4 << 30
MEMORY: Final = "memory"
RECIPE: Final = 2
"""Raised when something else is done to a guest before it is saved. 2: a container was made in it."""
_LOCK_LOOK_S: Final = 0.05
_KEY_CHARS: Final = 32


@dataclass(frozen=True, slots=True)
class Template:
    key: str
    path: Path
    """The file to load."""
    size_bytes: int
    used_at_s: float
    """Since the epoch."""


def without_identity(shape: MachineShape) -> MachineShape:
    """The shape without what belongs to one sandbox alone. What a template is booted as."""
    devices = tuple(replace(device, mac="") for device in shape.devices)
    return replace(shape, uuid="", generation_id="", devices=devices)


def key_of(image: GuestImage, shape: MachineShape) -> str:
    """Names the template that fits: the same for the same image, machine and QEMU."""
    described = {"recipe": RECIPE, "image": image.id, "shape": asdict(without_identity(shape))}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:_KEY_CHARS]


def over_limits(templates: Sequence[Template], *, count_max: int, bytes_max: int) -> list[Template]:
    """Which templates to drop, the longest unused first, so that the rest keeps both limits. Pure."""
    kept_bytes, dropped = 0, []
    for place, template in enumerate(sorted(templates, key=lambda one: one.used_at_s, reverse=True)):
        kept_bytes += template.size_bytes
        if place >= count_max or kept_bytes > bytes_max:
            dropped.append(template)
            kept_bytes -= template.size_bytes
    return dropped


class TemplateStore:
    """The templates under `cache_dir`. Calls touch few small files; saving is left to who makes a template."""

    def __init__(
        self, cache_dir: Path, *, count_max: int = TEMPLATES_MAX, bytes_max: int = TEMPLATES_BYTES_MAX
    ) -> None:
        self._folder = cache_dir / "templates"
        self._count_max = count_max
        self._bytes_max = bytes_max

    def find(self, key: str) -> Path | None:
        """The template's file, marked as used now; None: there is none."""
        path = self._folder / key / MEMORY
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def all(self) -> list[Template]:
        """Every template, the latest used first."""
        found = []
        for path in self._folder.glob(f"[0-9a-f]*/{MEMORY}"):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append(Template(path.parent.name, path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda one: one.used_at_s, reverse=True)

    async def ensure(self, key: str, save: Callable[[Path], Awaitable[None]]) -> Path:
        """The template's file; made by `save(path)` if there is none. One maker at a time, on the whole host.

        All or nothing: if `save` raises or is cancelled, nothing is left. Older templates above the limits go.

        Raises:
            NoRoom: no disk space.
            Rejected: the cache cannot be written.
        """
        if (path := self.find(key)) is not None:
            return path
        async with self._locked():
            if (path := self.find(key)) is not None:
                return path
            return await self._make(key, save)

    def drop(self, key: str) -> None:
        """Remove a template, for one that does not load. A sandbox that is loading it now is not disturbed."""
        shutil.rmtree(self._folder / key, ignore_errors=True)

    def prune(self) -> list[Template]:
        """Remove what is above the limits; what was removed."""
        dropped = over_limits(self.all(), count_max=self._count_max, bytes_max=self._bytes_max)
        for template in dropped:
            self.drop(template.key)
        return dropped

    async def _make(self, key: str, save: Callable[[Path], Awaitable[None]]) -> Path:
        for left in self._folder.glob(".making-*"):
            shutil.rmtree(left, ignore_errors=True)
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=self._folder))
        try:
            await save(making / MEMORY)
            await asyncio.to_thread(self._publish, making, self._folder / key)
        except OSError as error:
            raise NoRoom(f"template {self._folder / key} cannot be written: {error.strerror}") from error
        finally:
            shutil.rmtree(making, ignore_errors=True)
        self.prune()
        return self._folder / key / MEMORY

    @staticmethod
    def _publish(making: Path, place: Path) -> None:
        (making / MEMORY).chmod(0o400)
        sync(making / MEMORY)
        if place.exists():
            shutil.rmtree(place)
        making.rename(place)
        sync(place.parent)

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """The makers' lock. Looked at again and again, so that a waiting caller can be cancelled."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Rejected(
                f"templates: {self._folder} cannot be written: {error.strerror}; set places.cache_dir"
            ) from error
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_LOCK_LOOK_S)
            yield
        finally:
            os.close(descriptor)
