"""A scratch disk: an empty ext4 file for one container's changes. It takes space as it is written to."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from sandshift.errors import NoRoom, NotSupported, TimedOut, Unavailable
from sandshift.rootfs.plan import EXT4, DiskFile

SCRATCH_BYTES: Final = 8 << 30
"""Of the disk as the guest sees it."""
MAKE_S: Final = 60.0
_OPTIONS: Final = "lazy_itable_init=1,lazy_journal_init=1,discard"
_INODE_RATIO: Final = 65536
"""Bytes of disk per inode: a table of a quarter of mkfs.ext4's own, so that a fresh disk takes little space."""


def make(path: Path, size_bytes: int = SCRATCH_BYTES) -> DiskFile:
    """Make the file; nothing must be there. Blocks: about 30 ms. A failure leaves nothing.

    Raises:
        NotSupported: no mkfs.ext4. NoRoom: no space. Unavailable: its own words.
    """
    program = shutil.which("mkfs.ext4", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if program is None:
        raise NotSupported("mkfs.ext4 not found: apt-get install e2fsprogs")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"scratch disk {path} cannot be made: {error.strerror}") from error
    try:
        os.ftruncate(descriptor, size_bytes)
        _format(program, path)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)
    return DiskFile(path, EXT4, size_bytes, "", read_only=False, scratch=True)


def _format(program: str, path: Path) -> None:
    command = [program, "-q", "-F", "-E", _OPTIONS, "-i", str(_INODE_RATIO), "-m", "0", str(path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=MAKE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimedOut(f"scratch disk {path}: mkfs.ext4 did not end within {MAKE_S:g} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        kind = NoRoom if "No space left" in said else Unavailable
        raise kind(f"scratch disk {path}: mkfs.ext4 failed: {said[-500:]}")
