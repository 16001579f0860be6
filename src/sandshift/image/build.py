"""Building the guest image: packages in, three files and their description out.

The steps are small and each is in its own module; here they are put in order. Blocks for some ten seconds the first time
and for two when only our own code has changed: run it in a thread.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import msgspec

import sandshift
from sandshift.errors import NoRoom, NotSupported, Rejected, Unavailable
from sandshift.image import base, initramfs, own, store
from sandshift.image.distribution import BASE, Base, Progress, prepared
from sandshift.image.modules import OPTIONAL, WANTED, KernelTree
from sandshift.image.store import GuestImage

_BUILDER_FILES: Final = (
    "base.py",
    "build.py",
    "cpio.py",
    "distribution.py",
    "initramfs.py",
    "modules.py",
    "own.py",
)
KERNEL_COMMAND_LINE: Final = (
    "quiet console=ttyS0 reboot=t panic=-1 mitigations=off nokaslr cryptomgr.notests audit=0 no_timer_check"
)
"""For start-up speed (reference: measured 0.3 s under TCG). The guest is one sandbox's alone: its kernel guards no
neighbour, the VM does."""
AGENT: Final = ("/usr/bin/python3", "-S", "-s", "-E", "-P", f"/{own.START_SCRIPT}")
_ROOT_UUID: Final = "5a4d5348-1f7e-4000-8000-726f6f740001"


def find(cache_dir: Path) -> GuestImage | None:
    """The image used last that holds exactly this installation's agent; None: `build` one."""
    wanted, builder = own.digest(own.files()), builder_digest()
    for image in store.published(cache_dir):
        if image.description.own_digest == wanted and image.description.builder == builder:
            store.mark_used(image)
            return image
    return None


def build(
    cache_dir: Path,
    *,
    refresh: bool = False,
    sources: Path | None = None,
    progress: Progress = lambda _: None,
) -> GuestImage:
    """The image for this installation; made if the cache has none of this recipe.

    Args:
        cache_dir: `config.places.cache_dir`.
        refresh: ask the package archive for newer packages; without it the packages of the last build are used again.
        sources: an apt source list to use in place of the host's.
        progress: called with one line per step.

    Raises:
        NotSupported: the distribution is none of ours, or a tool is missing.
        Unavailable: the package archive cannot be reached.
        NoRoom: no disk space.
        Rejected: the cache cannot be written.
    """
    _check_tools()
    try:
        with store.locked(cache_dir):
            return _build(cache_dir, refresh=refresh, sources=sources, progress=progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(
                f"guest image: no disk space in {cache_dir}: free some, or set places.cache_dir"
            ) from error
        raise Rejected(f"guest image: {error.filename or cache_dir}: {error.strerror}") from error


def _build(cache_dir: Path, *, refresh: bool, sources: Path | None, progress: Progress) -> GuestImage:
    files = own.files()
    folder = prepared(cache_dir, refresh=refresh, sources=sources, progress=progress)
    described = msgspec.json.decode((folder / BASE).read_bytes(), type=Base)
    recipe = _recipe(described, own.digest(files))
    if (made := store.load(store.images_folder(cache_dir) / recipe[:32])) is not None:
        store.mark_used(made)
        return made
    progress("packing the root")
    with store.workshop(cache_dir) as work:
        image = _assemble(cache_dir, work, folder, described=described, files=files, recipe=recipe)
    store.prune(cache_dir)
    return image


def builder_digest() -> str:
    """SHA-256 over the modules that decide what an image looks like, hex."""
    return hashlib.sha256("".join(_file_digest(name) for name in _BUILDER_FILES).encode()).hexdigest()


def _file_digest(name: str) -> str:
    return store.file_sha256(Path(__file__).parent / name)


def _recipe(described: Base, own_digest: str) -> str:
    parts = [
        builder_digest(),
        msgspec.json.encode(described).decode(),
        own_digest,
        KERNEL_COMMAND_LINE,
        _mkfs_version(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _assemble(
    cache_dir: Path,
    work: Path,
    base_folder: Path,
    *,
    described: Base,
    files: list[own.OwnFile],
    recipe: str,
) -> GuestImage:
    root = work / "root"
    _copy_linked(base_folder / "root", root)
    own.write(files, root)
    base.compile_python(root, own.PLACE)
    base.check_imports(root, own.PLACE, own.IMPORTS)
    built = work / "built"
    built.mkdir()
    pack_erofs(root, built / store.ROOT)
    kernel = base_folder / "kernel"
    release = _kernel_release(kernel)
    shutil.copyfile(kernel / "boot" / f"vmlinuz-{release}", built / store.KERNEL)
    (built / store.INITRAMFS).write_bytes(_initramfs(root, kernel, release))
    description = store.Description(
        recipe=recipe,
        own_digest=own.digest(files),
        builder=builder_digest(),
        distribution=described.distribution,
        kernel_release=release,
        kernel_command_line=KERNEL_COMMAND_LINE,
        kernel_sha256=store.file_sha256(built / store.KERNEL),
        initramfs_sha256=store.file_sha256(built / store.INITRAMFS),
        root_sha256=store.file_sha256(built / store.ROOT),
        root_bytes=(built / store.ROOT).stat().st_size,
        python=base.python_version(root),
        agent_version=sandshift.VERSION,
        packages=(*described.packages, *described.kernel_packages),
    )
    return store.publish(cache_dir, built, description)


def _initramfs(root: Path, kernel: Path, release: str) -> bytes:
    tree = KernelTree(kernel / "usr/lib/modules" / release)
    chosen = tree.load_order((*WANTED, *(name for name in OPTIONAL if tree.has(name))))
    return initramfs.build((root / "usr/bin/busybox").read_bytes(), chosen, release, AGENT)


def pack_erofs(root: Path, image: Path) -> None:
    """Pack `root` into a read-only image: owners root, times 1970, the same bytes for the same files."""
    command = ["mkfs.erofs", "--quiet", "-T0", f"-U{_ROOT_UUID}", "--all-root", "-x-1", str(image), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-300:]
        if "No space left" in said:
            raise NoRoom(f"guest image: no disk space for {image}")
        raise Unavailable(f"guest image: mkfs.erofs failed: {said}")


def _check_tools() -> None:
    missing = [
        (tool, package)
        for tool, package in (("mkfs.erofs", "erofs-utils"), ("dpkg-deb", "dpkg"))
        if not shutil.which(tool)
    ]
    if missing:
        tools, packages = (" and ".join(words) for words in zip(*missing, strict=True))
        raise NotSupported(
            f"guest image: {tools} not found: apt-get install {packages.replace(' and ', ' ')}"
        )


def _kernel_release(kernel: Path) -> str:
    releases = sorted(path.name.removeprefix("vmlinuz-") for path in (kernel / "boot").glob("vmlinuz-*"))
    if len(releases) != 1:
        raise NotSupported(f"guest image: the kernel package holds {len(releases)} kernels, not one")
    return releases[0]


def _mkfs_version() -> str:
    done = subprocess.run(["mkfs.erofs", "-V"], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).splitlines()[0] if done.stdout or done.stderr else ""


def _copy_linked(source: Path, target: Path) -> None:
    """A copy whose files are hard links: quick, and never written to."""
    shutil.copytree(source, target, symlinks=True, copy_function=os.link)
