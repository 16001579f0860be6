"""The distribution's part of the image: which packages, fetched, unpacked and compiled once, and kept for the next builds."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from sandshift.errors import NoRoom, NotSupported
from sandshift.image import base, store
from sandshift.image.apt import Apt, Package

BASE: Final = "base.json"
BASES_MAX: Final = 2
ROOM_BYTES: Final = 600 << 20
"""What a build needs on the cache's file system."""
_DEBIAN: Final = {"12", "13"}
_UBUNTU_FROM: Final = (25, 4)

Progress = Callable[[str], None]


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """base.json: the distribution's part, unpacked and compiled, kept for the next build."""

    distribution: str
    packages: tuple[str, ...]
    kernel_packages: tuple[str, ...]


def prepared(cache_dir: Path, *, refresh: bool, sources: Path | None, progress: Progress) -> Path:
    """The folder of the distribution's part; made if it is not there."""
    distribution = supported_distribution(platform.freedesktop_os_release())
    bases = store.images_folder(cache_dir) / ".bases"
    for folder in _bases(bases) if not refresh else []:
        described = msgspec.json.decode((folder / BASE).read_bytes(), type=Base)
        if folder.name == _base_key(described) and described.distribution == distribution:
            return folder
    _check_room(cache_dir)
    progress("asking the package archive")
    apt = Apt(store.images_folder(cache_dir) / ".apt", sources=sources)
    apt.update()
    packages = apt.resolve(base.PACKAGES)
    kernel_packages = _kernel_packages(apt, distribution.split()[0])
    described = Base(
        distribution=distribution,
        packages=tuple(str(package) for package in packages),
        kernel_packages=tuple(str(package) for package in kernel_packages),
    )
    key = _base_key(described)
    if (bases / key / BASE).is_file():
        os.utime(bases / key / BASE)
        return bases / key
    with store.workshop(cache_dir) as work:
        return _make_base(
            apt,
            work,
            bases / key,
            described=described,
            packages=packages,
            kernel_packages=kernel_packages,
            progress=progress,
        )


def _base_key(described: Base) -> str:
    return hashlib.sha256(
        store.file_sha256(Path(base.__file__)).encode() + msgspec.json.encode(described)
    ).hexdigest()[:32]


def _make_base(
    apt: Apt,
    work: Path,
    place: Path,
    *,
    described: Base,
    packages: list[Package],
    kernel_packages: list[Package],
    progress: Progress,
) -> Path:
    megabytes = sum(package.size_bytes for package in (*packages, *kernel_packages)) // 1_000_000
    progress(f"fetching {len(packages) + len(kernel_packages)} packages, {megabytes} MB")
    apt.download([package.name for package in packages], work / "packages")
    apt.download([package.name for package in kernel_packages], work / "kernel-packages")
    progress("unpacking")
    made = work / "base"
    made.mkdir()
    base.unpack(sorted((work / "packages").iterdir()), made / "root")
    base.unpack_kernel(sorted((work / "kernel-packages").iterdir()), made / "kernel")
    progress("compiling Python's library")
    base.compile_python(made / "root", f"usr/lib/python{base.python_version(made / 'root')}")
    (made / BASE).write_bytes(msgspec.json.encode(described))
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        shutil.rmtree(place)
    made.rename(place)
    for old in _bases(place.parent)[BASES_MAX:]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def _bases(folder: Path) -> list[Path]:
    """The folders of the bases that are there, the latest first."""
    described = sorted(folder.glob(f"*/{BASE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in described]


def _kernel_packages(apt: Apt, distribution_id: str) -> list[Package]:
    """The kernel that the distribution's meta package names, and its modules where they are a package of their own."""
    meta = base.KERNEL_PACKAGES[distribution_id]
    image = next((name for name in apt.dependencies(meta) if name.startswith("linux-image-")), None)
    if image is None:
        raise NotSupported(f"guest image: {meta} names no kernel")
    modules = [name for name in apt.dependencies(image) if name.startswith("linux-modules-")]
    return apt.resolve_alone([image, *modules])


def supported_distribution(release: dict[str, str]) -> str:
    """Name and version from os-release. Pure.

    Raises:
        NotSupported: names what it is and what is supported.
    """
    name, version = release.get("ID", "unknown"), release.get("VERSION_ID", "")
    if name == "debian" and version in _DEBIAN:
        return f"{name} {version}"
    numbers = tuple(int(part) for part in version.split(".") if part.isdigit())
    if name == "ubuntu" and numbers >= _UBUNTU_FROM:
        return f"{name} {version}"
    raise NotSupported(
        f"guest image: {release.get('PRETTY_NAME', name)} is not supported: build it on Debian 12 or 13, or Ubuntu 25.04 or newer"
    )


def _check_room(cache_dir: Path) -> None:
    free = shutil.disk_usage(store.images_folder(cache_dir)).free
    if free < ROOM_BYTES:
        raise NoRoom(
            f"guest image: {cache_dir} has {free >> 20} MiB free and {ROOM_BYTES >> 20} are needed: free some, or set places.cache_dir"
        )
